//! A table of things in flight, named by small numbers that are used again. Allocates only while it grows.

/// See the module.
#[derive(Debug)]
pub(crate) struct Table<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Table<T> {
    /// An empty table with room for a usual load.
    pub(crate) fn new() -> Self {
        Self { places: Vec::with_capacity(64), free: Vec::with_capacity(64) }
    }

    /// Puts a value in and names it.
    pub(crate) fn insert(&mut self, value: T) -> (u32, &mut T) {
        let key = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            (self.places.len() - 1) as u32
        });
        (key, self.places[key as usize].insert(value))
    }

    /// The value at `key`, if any.
    pub(crate) fn get(&self, key: u32) -> Option<&T> {
        self.places.get(key as usize)?.as_ref()
    }

    /// The values and their keys.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(&self.places).filter_map(|(key, place)| Some((key, place.as_ref()?)))
    }

    /// The value at `key`, if any.
    pub(crate) fn get_mut(&mut self, key: u32) -> Option<&mut T> {
        self.places.get_mut(key as usize)?.as_mut()
    }

    /// Takes the value at `key` out; the key may be given again.
    pub(crate) fn remove(&mut self, key: u32) -> Option<T> {
        let value = self.places.get_mut(key as usize)?.take()?;
        self.free.push(key);
        Some(value)
    }

    /// How many values there are.
    pub(crate) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_used_again_but_never_twice_at_once() {
        let mut table = Table::new();
        let (first, _) = table.insert('a');
        let (second, _) = table.insert('b');
        assert_ne!(first, second);
        assert_eq!(table.remove(first), Some('a'));
        assert_eq!(table.remove(first), None);
        assert_eq!(table.insert('c').0, first);
        assert_eq!(table.get_mut(second), Some(&mut 'b'));
        assert_eq!(table.len(), 2);
    }
}

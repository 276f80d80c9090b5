//! XDR (RFC 4506), the parts that libvirt's protocol uses, bounded on the way in.

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// They end within a value.
    #[error("it ends {missing_bytes} bytes too early")]
    TooShort {
        /// How many are missing at least.
        missing_bytes: usize,
    },
    /// Bytes are left behind the last value.
    #[error("{left_bytes} bytes are left behind its end")]
    TooLong {
        /// How many.
        left_bytes: usize,
    },
    /// A text, some bytes or a list longer than is taken.
    #[error("it has {what} of length {len}, more than {max}")]
    Limit {
        /// What it is.
        what: &'static str,
        /// Its length: bytes, or elements of a list.
        len: u32,
        /// The most that is taken.
        max: u32,
    },
    /// A text that is no UTF-8.
    #[error("it has a text that is no UTF-8")]
    NotText,
    /// A number that stands for none of the values that there are.
    #[error("it has {what} {value}, which there is not")]
    Unknown {
        /// What it should name.
        what: &'static str,
        /// The number.
        value: i64,
    },
}

/// Takes values from bytes, one after the other.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the first of `bytes` on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Ends the reading: nothing may be left.
    pub fn finish(self) -> Result<(), XdrError> {
        match self.rest.len() {
            0 => Ok(()),
            left_bytes => Err(XdrError::TooLong { left_bytes }),
        }
    }

    /// An `unsigned int`.
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        self.array().map(u32::from_be_bytes)
    }

    /// An `int`, an enumeration, or a `char`, which takes four bytes as well.
    pub fn i32(&mut self) -> Result<i32, XdrError> {
        self.array().map(i32::from_be_bytes)
    }

    /// An `unsigned hyper`.
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Opaque data of a fixed length that is a multiple of four.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        const { assert!(N.is_multiple_of(4)) };
        let (value, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(XdrError::TooShort { missing_bytes: N - self.rest.len().min(N) })?;
        self.rest = rest;
        Ok(*value)
    }

    /// A `string` of at most `max_bytes`.
    pub fn text(&mut self, max_bytes: u32) -> Result<&'a str, XdrError> {
        let len_bytes = self.length("a text", max_bytes)?;
        let padded_bytes = len_bytes.next_multiple_of(4);
        let (padded, rest) = self
            .rest
            .split_at_checked(padded_bytes)
            .ok_or(XdrError::TooShort { missing_bytes: padded_bytes - self.rest.len().min(padded_bytes) })?;
        self.rest = rest;
        let text = padded.get(..len_bytes).unwrap_or_default();
        std::str::from_utf8(text).map_err(|_| XdrError::NotText)
    }

    /// A value that may be missing: a pointer in the definitions.
    pub fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Option<T>, XdrError> {
        match self.u32()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            value => Err(XdrError::Unknown { what: "a pointer's sign", value: value.into() }),
        }
    }

    /// A list of at most `max` elements. Memory follows the elements that are there, not the count that is told.
    pub fn list<T>(
        &mut self,
        max: u32,
        mut read: impl FnMut(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Vec<T>, XdrError> {
        let count = self.length("a list", max)?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(read(self)?);
        }
        Ok(list)
    }

    fn length(&mut self, what: &'static str, max: u32) -> Result<usize, XdrError> {
        let len = self.u32()?;
        if len > max {
            return Err(XdrError::Limit { what, len, max });
        }
        usize::try_from(len).map_err(|_| XdrError::Limit { what, len, max })
    }
}

/// Puts values into bytes, one after the other.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An `unsigned int`.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Self {
        self.bytes.extend(value.to_be_bytes());
        self
    }

    /// An `int` or an enumeration.
    #[must_use]
    pub fn i32(mut self, value: i32) -> Self {
        self.bytes.extend(value.to_be_bytes());
        self
    }

    /// An `unsigned hyper`.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Self {
        self.bytes.extend(value.to_be_bytes());
        self
    }

    /// Opaque data of a fixed length that is a multiple of four.
    #[must_use]
    pub fn array<const N: usize>(mut self, value: &[u8; N]) -> Self {
        const { assert!(N.is_multiple_of(4)) };
        self.bytes.extend(value);
        self
    }

    /// A `string`. One of 4 GiB and more can't be, and is cut.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let mut this = self.u32(len);
        this.bytes.extend(text.bytes().take(len as usize));
        this.bytes.resize(this.bytes.len().next_multiple_of(4), 0);
        this
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let bytes = Writer::default()
            .u32(7)
            .i32(-1)
            .u64(1 << 40)
            .text("abcde")
            .array(&[9; 16])
            .u32(1)
            .text("x")
            .u32(0)
            .u32(2)
            .u32(3)
            .u32(4)
            .into_bytes();
        assert_eq!(bytes.len() % 4, 0);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.u32(), Ok(7));
        assert_eq!(reader.i32(), Ok(-1));
        assert_eq!(reader.u64(), Ok(1 << 40));
        assert_eq!(reader.text(5), Ok("abcde"));
        assert_eq!(reader.array(), Ok([9_u8; 16]));
        assert_eq!(reader.optional(|reader| reader.text(1)), Ok(Some("x")));
        assert_eq!(reader.optional(|reader| reader.text(1)), Ok(None));
        assert_eq!(reader.list(2, Reader::u32), Ok(vec![3, 4]));
        assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let long = Writer::default().u32(u32::MAX).into_bytes();
        assert_eq!(
            Reader::new(&long).text(8),
            Err(XdrError::Limit { what: "a text", len: u32::MAX, max: 8 })
        );
        assert_eq!(
            Reader::new(&long).list(u32::MAX, Reader::u32),
            Err(XdrError::TooShort { missing_bytes: 4 }),
            "memory is not taken ahead for elements that don't come"
        );
        let cut = Writer::default().u32(5).u32(0).into_bytes();
        assert_eq!(Reader::new(&cut).text(8), Err(XdrError::TooShort { missing_bytes: 4 }));
        assert_eq!(Reader::new(&[0, 0]).u64(), Err(XdrError::TooShort { missing_bytes: 6 }));
        assert_eq!(Reader::new(&[0, 0, 0, 1, 0xff, 0, 0, 0]).text(4), Err(XdrError::NotText));
        assert!(matches!(
            Reader::new(&[0, 0, 0, 2]).optional(Reader::u32),
            Err(XdrError::Unknown { value: 2, .. })
        ));
        assert_eq!(Reader::new(&[1]).finish(), Err(XdrError::TooLong { left_bytes: 1 }));
    }
}

//! The scratch file: made, opened after whatever ended the last process, and removed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use journal::crypt::{Cipher, Encryption, Keyring, SegmentKey, SiteKeyId, WrappedKey};
use journal::storage::AlignedBuf;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use uuid::Uuid;

use super::commit::{Commit, Next};
use super::error::ScratchError;
use super::format::{
    DISK_MAX_BYTES, HEADER_OFFSETS, Header, PAGE_BYTES, PAGE_WORDS, ScratchFormatError, ScratchOwner, Shape,
    decode_page,
};
use super::map::{MapDamage, ScratchMap, drop_stale};
use super::noted::{self, Deed};
use super::pages::{PageVersion, Pages};
use super::words::{Words, this_boot};
use super::{CHUNK_BYTES, SECTOR_BYTES};

/// Pages of the map that are read at once.
const READ_PAGES: usize = 256;

/// What is written to a view: a file of a fixed length. One that is made with [`ScratchFile::create`] has no name and goes when dropped; one of
/// [`ScratchFile::make`] or [`ScratchFile::open`] stays until [`remove`].
#[derive(Debug)]
pub struct ScratchFile {
    pub(in crate::view) file: File,
    /// What reads and writes the data.
    pub(in crate::view) cipher: Cipher,
    path: PathBuf,
    kind: Kind,
}

/// How the journal of the view's VM is encrypted: its scratch is so too.
#[derive(Clone, Copy, Debug)]
pub struct ScratchKeys<'a> {
    /// The journal's keys.
    pub keyring: &'a Keyring,
    /// Whether it encrypts now.
    pub encryption: Encryption,
}

impl ScratchKeys<'_> {
    fn key(&self) -> Option<WrappedKey> {
        match self.encryption {
            Encryption::On(key) => Some(key),
            Encryption::Never | Encryption::Off => None,
        }
    }

    /// What reads and writes the data of a file with this header.
    fn cipher(&self, header: &Header, path: &Path) -> Result<Cipher, ScratchError> {
        let Some(key) = header.key else { return Ok(Cipher::plain()) };
        let cipher =
            self.keyring.cipher_of(&SegmentKey { key, salt: header.file_id.into_bytes() }, b"scratch");
        cipher.map_err(|source| ScratchError::Key { path: path.into(), source })
    }
}

#[derive(Debug)]
enum Kind {
    /// Data and nothing else, of this length in bytes.
    Passing(u64),
    Lasting(Box<Lasting>),
}

#[derive(Debug)]
struct Lasting {
    header: Header,
    /// The file that holds the map while a process has it; without one nothing is there that was not made durable.
    live: Option<PathBuf>,
    /// Until the map is taken.
    parts: Option<(Words, Pages)>,
}

impl ScratchFile {
    /// Makes a scratch file that holds up to `len_bytes` (rounded up to [`CHUNK_BYTES`]) of written data and ends with this process, with
    /// its space reserved if the filesystem can. A file of that name, left by a process that was killed, is replaced. The data is encrypted
    /// if asked for, with a key that nobody keeps.
    ///
    /// # Errors
    /// [`ScratchError::Io`], [`ScratchError::Space`] or [`ScratchError::NoRandom`].
    pub fn create(path: &Path, len_bytes: u64, is_encrypted: bool) -> Result<Self, ScratchError> {
        let cipher = if is_encrypted { Cipher::passing()? } else { Cipher::plain() };
        let len_bytes = len_bytes.max(1).next_multiple_of(CHUNK_BYTES);
        match std::fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("replace", path)(source));
            }
            _ => {}
        }
        let file = open_file(path, true).map_err(io_error("make", path))?;
        // However the process ends, the space is free again.
        std::fs::remove_file(path).map_err(io_error("unlink", path))?;
        reserve(&file, path, len_bytes)?;
        Ok(Self { file, cipher, path: path.into(), kind: Kind::Passing(len_bytes) })
    }

    /// Makes a scratch file that outlives this process, for up to `limit_bytes` of written data, with all of its space reserved if the
    /// filesystem can. `live` is where the map lies while a process has it: a file in memory, of this host. The data is encrypted if the
    /// journal is.
    ///
    /// # Errors
    /// [`ScratchError`]; the file is gone again then.
    pub fn make(
        path: &Path,
        live: &Path,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        limit_bytes: u64,
    ) -> Result<Self, ScratchError> {
        Self::make_in(this_boot(), path, Some(live), owner, keys, limit_bytes)
    }

    /// Makes a scratch file that no guest writes to: after the process's death what was made durable is there, and no more.
    ///
    /// # Errors
    /// [`ScratchError`]; the file is gone again then.
    pub fn make_overlay(
        path: &Path,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        limit_bytes: u64,
    ) -> Result<Self, ScratchError> {
        Self::make_in(Uuid::nil(), path, None, owner, keys, limit_bytes)
    }

    /// As [`ScratchFile::make`], in a given run of the kernel.
    pub(in crate::view) fn make_in(
        boot: Uuid,
        path: &Path,
        live: Option<&Path>,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        limit_bytes: u64,
    ) -> Result<Self, ScratchError> {
        if owner.disk_bytes > DISK_MAX_BYTES {
            return Err(ScratchError::DiskTooLong { disk_bytes: owner.disk_bytes });
        }
        let shape = Shape::new(owner.disk_bytes, limit_bytes);
        let file_id = Uuid::new_v4();
        let key = keys.key();
        let header = Header { sequence: 1, file_id, boot, owner: *owner, shape, key, kept_seq: 0 };
        let cipher = keys.cipher(&header, path)?;
        let file = open_file(path, true).map_err(io_error("make", path))?;
        let made = (|| {
            lock(&file, path, Instant::now())?;
            reserve(&file, path, shape.file_bytes())?;
            let words = vec![0; shape.words()];
            let pages = Pages::new(file_id, words.clone(), &vec![PageVersion::NEVER; shape.pages() as usize]);
            let words = make_words(live, header.boot, file_id, &words, path)?;
            // The header comes last: without it nobody takes the file for a scratch.
            for offset_bytes in HEADER_OFFSETS {
                write_page(&file, offset_bytes, &header.encode()).map_err(io_error("write", path))?;
            }
            let synced = noted::during(Deed::Sync, || file.sync_all());
            synced.and_then(|()| sync_folder(path)).map_err(io_error("sync", path))?;
            Ok(Lasting { header, live: live.map(Path::to_owned), parts: Some((words, pages)) })
        })();
        match made {
            Ok(lasting) => {
                Ok(Self { file, cipher, path: path.into(), kind: Kind::Lasting(Box::new(lasting)) })
            }
            Err(error) => {
                let _ = live.map_or_else(|| remove_overlay(path), |live| remove(path, live));
                Err(error)
            }
        }
    }

    /// Opens a scratch file again, whatever ended the process that had it. After that process's death all that it had answered is there;
    /// after the host's, all that was flushed. The lock is waited for until `lock_until`, and tried once in any case.
    ///
    /// # Errors
    /// [`ScratchError`]; the file is as it was.
    pub fn open(
        path: &Path,
        live: &Path,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        lock_until: Instant,
    ) -> Result<Self, ScratchError> {
        Self::open_in(this_boot(), path, Some(live), owner, keys, lock_until)
    }

    /// The same of a file of [`ScratchFile::make_overlay`].
    ///
    /// # Errors
    /// [`ScratchError`]; the file is as it was.
    pub fn open_overlay(
        path: &Path,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        lock_until: Instant,
    ) -> Result<Self, ScratchError> {
        Self::open_in(Uuid::nil(), path, None, owner, keys, lock_until)
    }

    /// As [`ScratchFile::open`], in a given run of the kernel.
    pub(in crate::view) fn open_in(
        boot: Uuid,
        path: &Path,
        live: Option<&Path>,
        owner: &ScratchOwner,
        keys: &ScratchKeys<'_>,
        lock_until: Instant,
    ) -> Result<Self, ScratchError> {
        let file = open_file(path, false).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ScratchError::Missing { path: path.into() },
            _ => io_error("open", path)(source),
        })?;
        lock(&file, path, lock_until)?;
        let header = read_header(&file, path)?;
        if !header.owner.may_be(owner) {
            return Err(ScratchError::Other { path: path.into() });
        }
        let cipher = keys.cipher(&header, path)?;
        let Header { file_id, shape, .. } = header;
        let mut settled = vec![0; shape.words()];
        let versions = read_pages(&file, file_id, shape, &mut settled, path)?;
        // What was read may not be durable yet, and the older copies are written over next (C1).
        sync(&file).map_err(io_error("sync", path))?;
        let words = if let Some(live) = live.filter(|_| !boot.is_nil() && header.boot == boot) {
            let words = Words::open(live, boot, file_id, shape.words()).map_err(memory(path, live))?;
            words.ok_or_else(|| ScratchError::LiveMapLost { path: path.into(), live: live.into() })?
        } else {
            let mut words = settled.clone();
            drop_stale(shape, &mut words, &versions).map_err(damaged(path))?;
            make_words(live, boot, file_id, &words, path)?
        };
        let pages = Pages::new(file_id, settled, &versions);
        let parts = Some((words, pages));
        let mut scratch = Self {
            file,
            cipher,
            path: path.into(),
            kind: Kind::Lasting(Box::new(Lasting { header, live: live.map(Path::to_owned), parts })),
        };
        if header.boot != boot {
            scratch.write_header(boot)?;
        }
        Ok(scratch)
    }

    /// Opens a file of [`ScratchFile::make_overlay`] to read, beside a process that may be adding to it: what it has is never changed.
    ///
    /// # Errors
    /// [`ScratchError`].
    pub fn look_at_overlay(
        path: &Path,
        keys: &ScratchKeys<'_>,
    ) -> Result<(Self, ScratchOwner), ScratchError> {
        let file = open_to_look(path)?;
        // The map is read after the header: it has at least what was kept by then.
        let header = read_header(&file, path)?;
        let cipher = keys.cipher(&header, path)?;
        let Header { file_id, shape, owner, .. } = header;
        let mut words = vec![0; shape.words()];
        let versions = read_pages(&file, file_id, shape, &mut words, path)?;
        let pages = Pages::new(file_id, words.clone(), &versions);
        drop_stale(shape, &mut words, &versions).map_err(damaged(path))?;
        let parts = Some((make_words(None, Uuid::nil(), file_id, &words, path)?, pages));
        let kind = Kind::Lasting(Box::new(Lasting { header, live: None, parts }));
        Ok((Self { file, cipher, path: path.into(), kind }, owner))
    }

    /// Whose a scratch file is; none where the file isn't one for certain.
    ///
    /// # Errors
    /// [`ScratchError::Busy`] while a process has it, [`ScratchError::Missing`] or [`ScratchError::Io`].
    pub fn owner(path: &Path) -> Result<Option<ScratchOwner>, ScratchError> {
        Ok(read_locked(path)?.map(|header| header.owner))
    }

    /// Another descriptor of it.
    pub(in crate::view) fn duplicate(&self) -> Result<File, ScratchError> {
        self.file.try_clone().map_err(io_error("duplicate the descriptor of", &self.path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The site key that its data can't be read without, if it lasts and is encrypted.
    pub(in crate::view) fn site_key_id(&self) -> Option<SiteKeyId> {
        match &self.kind {
            Kind::Passing(_) => None,
            Kind::Lasting(lasting) => lasting.header.key.map(|key| key.site_key_id()),
        }
    }

    /// Size of the disk that it is for, in bytes; a passing one is for any.
    pub(crate) fn disk_bytes(&self) -> Option<u64> {
        match &self.kind {
            Kind::Passing(_) => None,
            Kind::Lasting(lasting) => Some(lasting.header.owner.disk_bytes),
        }
    }

    /// The map, once. A passing one is for a disk of `disk_bytes`.
    pub(in crate::view) fn take_map(&mut self, disk_bytes: u64) -> Result<ScratchMap, ScratchError> {
        let path = &self.path;
        match &mut self.kind {
            Kind::Passing(len_bytes) => {
                let shape = Shape::new(disk_bytes, *len_bytes);
                let words = Words::own(shape.zeroes_word()).map_err(memory(path, path))?;
                Ok(ScratchMap::passing(shape, words))
            }
            Kind::Lasting(lasting) => {
                let (words, pages) =
                    lasting.parts.take().ok_or_else(|| ScratchError::Busy { path: path.clone() })?;
                ScratchMap::lasting(lasting.header.shape, words, pages).map_err(damaged(path))
            }
        }
    }

    /// Takes the map of a file that is only looked at; gives how many bytes of the disk may be in it.
    ///
    /// # Errors
    /// [`ScratchError::Damaged`]; [`ScratchError::Busy`] if somebody has the map.
    pub fn check_map(&mut self) -> Result<u64, ScratchError> {
        let disk_bytes = match &self.kind {
            Kind::Passing(_) => 0,
            Kind::Lasting(lasting) => lasting.header.shape.disk_bytes,
        };
        self.take_map(disk_bytes).map(|map| map.used_bytes())
    }

    /// Makes all durable and notes that nothing but the file is needed to open it again. To be called when nobody uses the scratch any more.
    pub(in crate::view) fn close(&mut self, map: &mut ScratchMap) -> Result<(), ScratchError> {
        let Kind::Lasting(lasting) = &self.kind else { return Ok(()) };
        let live = lasting.live.clone();
        let mut commit = Commit::new(map.begin_commit());
        let mut last = sync(&self.file);
        loop {
            let errno = |error: &io::Error| ublk::serve::Errno(error.raw_os_error().unwrap_or(libc::EIO));
            match commit.done(last.as_ref().map(drop).map_err(errno)) {
                Next::Wait => {}
                Next::Pages { first, count, .. } => {
                    let Some(pages) = map.pages() else { break };
                    for page in first..first + count {
                        let mut bytes = [0; PAGE_BYTES];
                        let offset_bytes = pages.encode(page, &mut bytes);
                        last = last.and(write_page(&self.file, offset_bytes, &bytes));
                        if page + 1 < first + count {
                            let _ = commit.done(Ok(()));
                        }
                    }
                    // One page alone was to be durable by itself.
                    last = last.and_then(|()| sync(&self.file));
                }
                Next::Sync => last = sync(&self.file),
                Next::End(Ok(())) => break,
                Next::End(Err(_)) => return last.map_err(io_error("write", &self.path)),
            }
        }
        map.end_commit();
        self.write_header(Uuid::nil())?;
        if let Some(live) = live {
            let _ = std::fs::remove_file(live);
        }
        Ok(())
    }

    fn write_header(&mut self, boot: Uuid) -> Result<(), ScratchError> {
        let Kind::Lasting(lasting) = &mut self.kind else { return Ok(()) };
        let header = Header { sequence: lasting.header.sequence + 1, boot, ..lasting.header };
        write_header(&self.file, &self.path, &header)?;
        lasting.header = header;
        Ok(())
    }

    /// Whether it outlives the process.
    pub(in crate::view) fn is_lasting(&self) -> bool {
        matches!(self.kind, Kind::Lasting(_))
    }

    /// What promotion may have changed beneath the view, since it is in the scratch: everything up to this number; 0 if nothing.
    pub fn kept_seq(&self) -> u64 {
        match &self.kind {
            Kind::Passing(_) => 0,
            Kind::Lasting(lasting) => lasting.header.kept_seq,
        }
    }

    /// The same of a file that nobody has open. The lock is waited for until `lock_until`, and tried once in any case.
    ///
    /// # Errors
    /// [`ScratchError`].
    pub fn kept_seq_at(path: &Path, lock_until: Instant) -> Result<u64, ScratchError> {
        let file = open_to_look(path)?;
        lock(&file, path, lock_until)?;
        read_header(&file, path).map(|header| header.kept_seq)
    }

    /// The header that says how much was copied, to be written without holding anybody up; [`ScratchFile::kept`] takes it.
    pub(in crate::view) fn keeping(&self, through_seq: u64) -> Result<Keeping, ScratchError> {
        let Kind::Lasting(lasting) = &self.kind else {
            return Err(ScratchError::Missing { path: self.path.clone() });
        };
        let kept_seq = lasting.header.kept_seq.max(through_seq);
        let header = Header { sequence: lasting.header.sequence + 1, kept_seq, ..lasting.header };
        let file = self.duplicate()?;
        Ok(Keeping { file, path: self.path.clone(), header })
    }

    /// What [`ScratchFile::keeping`] gave is durable.
    pub(in crate::view) fn kept(&mut self, noted: Kept) {
        if let Kind::Lasting(lasting) = &mut self.kind {
            lasting.header = noted.0;
        }
    }
}

/// A header to be written.
pub(in crate::view) struct Keeping {
    file: File,
    path: PathBuf,
    header: Header,
}

/// A header that is durable.
pub(in crate::view) struct Kept(Header);

impl Keeping {
    /// Writes it. Waits for the disk.
    pub(in crate::view) fn write(self) -> Result<Kept, ScratchError> {
        write_header(&self.file, &self.path, &self.header)?;
        Ok(Kept(self.header))
    }
}

fn write_header(file: &File, path: &Path, header: &Header) -> Result<(), ScratchError> {
    for copy in [header.sequence % 2, (header.sequence + 1) % 2] {
        let written = write_page(file, HEADER_OFFSETS[copy as usize], &header.encode());
        written.and_then(|()| sync(file)).map_err(io_error("write", path))?;
    }
    Ok(())
}

/// Removes a scratch file and its map in memory, if they are there.
///
/// # Errors
/// [`ScratchError::Io`].
pub fn remove(path: &Path, live: &Path) -> Result<(), ScratchError> {
    remove_overlay(path).and_then(|()| remove_overlay(live))
}

/// Removes a file of [`ScratchFile::make_overlay`], if it is there.
///
/// # Errors
/// [`ScratchError::Io`].
pub fn remove_overlay(path: &Path) -> Result<(), ScratchError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(source)),
        _ => Ok(()),
    }
}

/// Memory for a map, with what it says: in the file `live`, or this process's own.
fn make_words(
    live: Option<&Path>,
    boot: Uuid,
    file_id: Uuid,
    fill: &[u64],
    path: &Path,
) -> Result<Words, ScratchError> {
    let made = match live {
        Some(live) => Words::create(live, boot, file_id, fill),
        None => Words::own_with(fill),
    };
    made.map_err(memory(path, live.unwrap_or(path)))
}

fn open_file(path: &Path, is_new: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(is_new).mode(0o600);
    let direct = options.custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path);
    match direct {
        // Guests write single sectors; where the filesystem wants longer direct I/O the page cache puts them together.
        Ok(file) if ublk::backing::direct_io_align(&file).is_ok_and(|align| align <= SECTOR_BYTES as u32) => {
            Ok(file)
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
            Err(error)
        }
        _ => options.create_new(false).create(is_new).custom_flags(libc::O_CLOEXEC).open(path),
    }
}

fn reserve(file: &File, path: &Path, len_bytes: u64) -> Result<(), ScratchError> {
    let lengthened = noted::during(Deed::Reserve { len_bytes }, || file.set_len(len_bytes));
    lengthened.map_err(io_error("make", path))?;
    match fallocate(file, FallocateFlags::empty(), 0, len_bytes as i64) {
        Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(Errno::ENOSPC | Errno::EDQUOT) => Err(ScratchError::Space { path: path.into(), len_bytes }),
        Err(errno) => Err(io_error("make", path)(errno.into())),
    }
}

/// Locks the very open file that is used for I/O: what a process that died has under way holds the lock until it has ended (A4).
fn lock(file: &File, path: &Path, until: Instant) -> Result<(), ScratchError> {
    while !try_lock(file).map_err(io_error("lock", path))? {
        if Instant::now() >= until {
            return Err(ScratchError::Busy { path: path.into() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open; no memory is involved.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EWOULDBLOCK) { Ok(false) } else { Err(error) }
}

/// The header of a file that no process has open; none where the file isn't a scratch for certain.
fn open_to_look(path: &Path) -> Result<File, ScratchError> {
    File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ScratchError::Missing { path: path.into() },
        _ => io_error("open", path)(source),
    })
}

/// The header of a file, if it has one for certain.
fn read_locked(path: &Path) -> Result<Option<Header>, ScratchError> {
    let file = open_to_look(path)?;
    if !try_lock(&file).map_err(io_error("lock", path))? {
        return Err(ScratchError::Busy { path: path.into() });
    }
    match read_header(&file, path) {
        Ok(header) => Ok(Some(header)),
        Err(ScratchError::Format { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The header that counts, of a file that is as long as it says.
fn read_header(file: &File, path: &Path) -> Result<Header, ScratchError> {
    let format = |source| ScratchError::Format { path: path.into(), source };
    let len_bytes = file.metadata().map_err(io_error("look at", path))?.len();
    let (mut newest, mut refusal): (Option<Header>, _) = (None, format(ScratchFormatError::Magic));
    for offset_bytes in HEADER_OFFSETS {
        if offset_bytes + PAGE_BYTES as u64 > len_bytes {
            continue;
        }
        let mut page = AlignedBuf::zeroed(PAGE_BYTES);
        if let Err(source) = file.read_exact_at(&mut page, offset_bytes) {
            // Both are durable before anybody relies on what they say.
            refusal = io_error("read", path)(source);
            continue;
        }
        match Header::decode(&page) {
            Ok(header) if newest.is_none_or(|newest| header.sequence > newest.sequence) => {
                newest = Some(header);
            }
            Ok(_) => {}
            // The other copy may be the older one.
            Err(error @ ScratchFormatError::Version(_)) => return Err(format(error)),
            Err(error) => refusal = format(error),
        }
    }
    let header = newest.ok_or(refusal)?;
    if len_bytes < header.shape.file_bytes() {
        return Err(format(ScratchFormatError::Field("length: the file was cut short")));
    }
    Ok(header)
}

/// Reads of each page the copy that counts.
fn read_pages(
    file: &File,
    file_id: Uuid,
    shape: Shape,
    words: &mut [u64],
    path: &Path,
) -> Result<Vec<PageVersion>, ScratchError> {
    let mut versions = Vec::with_capacity(shape.pages() as usize);
    let mut buffer = AlignedBuf::zeroed(2 * READ_PAGES.min(shape.pages() as usize) * PAGE_BYTES);
    let mut other = vec![0; PAGE_WORDS];
    for (first, words) in
        (0..shape.pages()).step_by(READ_PAGES).zip(words.chunks_mut(READ_PAGES * PAGE_WORDS))
    {
        let bytes = &mut buffer[..words.len() / PAGE_WORDS * 2 * PAGE_BYTES];
        file.read_exact_at(bytes, Shape::page_offset_bytes(first, 0)).map_err(io_error("read", path))?;
        for ((page, words), copies) in
            (first..).zip(words.chunks_mut(PAGE_WORDS)).zip(bytes.chunks(2 * PAGE_BYTES))
        {
            let one = decode_page(&copies[..PAGE_BYTES], file_id, page, words);
            let two = decode_page(&copies[PAGE_BYTES..], file_id, page, &mut other);
            let is_alone = one.is_err() || two.is_err() || words != other;
            let (sequence, copy) = match (one, two) {
                (Ok(one), Ok(two)) if one >= two => (one, 0),
                (Ok(one), Err(_)) => (one, 0),
                (_, Ok(two)) => {
                    words.copy_from_slice(&other);
                    (two, 1)
                }
                (Err(source), Err(_)) => return Err(ScratchError::Format { path: path.into(), source }),
            };
            versions.push(PageVersion { sequence, copy, is_alone });
        }
    }
    Ok(versions)
}

fn write_page(file: &File, offset_bytes: u64, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
    let mut aligned = AlignedBuf::zeroed(PAGE_BYTES);
    aligned.copy_from_slice(page);
    noted::during(Deed::Write { offset_bytes, page }, || file.write_all_at(&aligned, offset_bytes))
}

fn sync(file: &File) -> io::Result<()> {
    noted::during(Deed::Sync, || file.sync_data())
}

fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ScratchError {
    move |source| ScratchError::Io { action, path: path.into(), source }
}

fn memory(path: &Path, live: &Path) -> impl Fn(io::Error) -> ScratchError {
    move |source| ScratchError::Memory { path: path.into(), live: live.into(), source }
}

fn damaged(path: &Path) -> impl Fn(MapDamage) -> ScratchError {
    move |source| ScratchError::Damaged { path: path.into(), source }
}

#[cfg(test)]
mod tests;

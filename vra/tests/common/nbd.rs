//! A small NBD client: one request after the other on a unix socket, as fast as the door answers.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ::vra::api::DoorAddress;

const OPTION_MAGIC: &[u8] = b"IHAVEOPT";
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;

/// A connection to an export.
pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
}

impl NbdClient {
    pub fn connect(door: &DoorAddress) -> io::Result<Self> {
        let DoorAddress::NbdUnix { path, export } = door else { panic!("{door} is not on a unix socket") };
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[8..16], OPTION_MAGIC);
        // Fixed newstyle without padding, then the option EXPORT_NAME.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(OPTION_MAGIC);
        hello.extend_from_slice(&1_u32.to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        stream.write_all(&hello)?;
        stream.read_exact(&mut [0; 10])?;
        Ok(Self { stream, cookie: 0 })
    }

    /// Writes, and waits for the answer.
    pub fn write(&mut self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        self.send_write(offset_bytes, data)?;
        self.answer()
    }

    /// Sends a write, and waits for nothing.
    pub fn send_write(&mut self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        let mut request = self.header(WRITE, offset_bytes, data.len());
        request.extend_from_slice(data);
        self.stream.write_all(&request)
    }

    /// Reads.
    pub fn read(&mut self, offset_bytes: u64, len_bytes: usize) -> io::Result<Vec<u8>> {
        let request = self.header(READ, offset_bytes, len_bytes);
        self.stream.write_all(&request)?;
        self.answer()?;
        let mut data = vec![0; len_bytes];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    fn header(&mut self, kind: u16, offset_bytes: u64, len_bytes: usize) -> Vec<u8> {
        self.cookie += 1;
        let mut header = REQUEST_MAGIC.to_be_bytes().to_vec();
        header.extend_from_slice(&0_u16.to_be_bytes());
        header.extend_from_slice(&kind.to_be_bytes());
        header.extend_from_slice(&self.cookie.to_be_bytes());
        header.extend_from_slice(&offset_bytes.to_be_bytes());
        header.extend_from_slice(&(len_bytes as u32).to_be_bytes());
        header
    }

    fn answer(&mut self) -> io::Result<()> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        assert_eq!(reply[8..], self.cookie.to_be_bytes());
        match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.cast_signed())),
        }
    }
}

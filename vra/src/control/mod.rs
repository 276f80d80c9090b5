//! The control protocol's transport: frames, client and server, over any byte stream.

mod client;
mod frame;
mod server;

pub use client::{Client, ClientError};
pub use frame::{FrameError, read_frame, write_frame};
pub use server::{Caller, Handler, UnixServer, serve_stream};

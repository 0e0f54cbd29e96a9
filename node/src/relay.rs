//! The relay: carries one VM's memory, disks and device state between two QEMUs.
//!
//! Owns the data path of both ends. The source end sits behind the socket that its QEMU migrates
//! to and takes what mirrors write; the destination end writes pages into the guest's memfd and
//! blocks into its images and feeds the rest to its QEMU,
//! which waits with `x-ignore-shared` under `-S`. Never starts, stops or asks a QEMU, never opens a
//! network connection: sockets, streams, memory and what is known come as parameters. Invariant: a
//! page stays with the source until the destination has placed it, and an older version of a page
//! never replaces a younger one.
//!
//! ```text
//! mirror -> inlet \
//! QEMU -> reader -> batches -> hash -> offer  ->  claim, copy what is known -> memfd, image
//!                     ^                <- want <-
//!                     | store          literal ->  decompress, write, read back, hash
//!                     +-------------- <- placed <-
//!         opaque bytes ------------------------->  blob -> QEMU (device state after all pages)
//! ```

mod budget;
mod buffers;
pub mod corpus;
pub mod dest;
mod error;
mod frames;
mod pack;
mod pool;
pub mod sink;
pub mod source;
mod stream;
mod table;

pub use budget::{Budget, Seat};
pub use corpus::Corpus;
pub use dest::{DestEnd, DestHandle, DestParams, DestProgress, DestinationSession, Settle};
pub use error::RelayError;
pub use frames::{Connector, Duplex, Stream};
pub use sink::{FileSink, PageSink};
pub use source::{
    ImageReader, Inlet, PageCounts, SourceEnd, SourceHandle, SourceParams, SourceProgress,
    SourceSession,
};

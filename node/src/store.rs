//! What a node keeps: its hard state (what it has promised and decided) and its corpus (what it can
//! produce by chunk id).
//!
//! Owns files in the state directory and the index in memory. Never decides anything. Everything
//! here blocks: asynchronous callers go through `spawn_blocking`.

pub mod corpus;
pub mod hard;
pub mod images;
mod index;
mod index_file;
mod pace;
mod scan;
mod source;

pub use corpus::{Corpus, SourceId};
pub use hard::{Hard, StoreError};
pub use images::{Images, Settings};
pub use source::ReadAt;

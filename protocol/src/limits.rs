//! Every bound of the project, in one place.
//!
//! Owns constants only. Each queue, message and wait elsewhere names one of these.

/// Bytes of a guest page and of a chunk.
pub const CHUNK_BYTES: usize = 4096;
/// Bytes of a digest region (memory and disk).
pub const REGION_BYTES: usize = 2 << 20;
/// Longest control message, bytes.
pub const CONTROL_MESSAGE_BYTES: usize = 1 << 20;
/// Longest stored value, bytes: what a voter holds of a cluster is two records.
pub const STORED_BYTES: usize = 4 << 20;
/// Longest bulk message (one batch with literals), bytes.
pub const BULK_MESSAGE_BYTES: usize = 8 << 20;
/// Most hosts of a swarm that a node keeps track of.
pub const MEMBERS: usize = 4096;
/// Longest membership message, bytes.
pub const MEMBERSHIP_BYTES: usize = 8 << 10;
/// Most voters of a record.
pub const VOTERS: usize = 5;
/// Most members of a virtual cluster.
pub const CLUSTER_VMS: usize = 256;
/// Most ends of migrations that a host takes part in at the same time.
pub const MOVES: usize = 1024;
/// Most VMs that a record remembers to have left: as many as a cluster has members, and once more
/// when it is dissolved.
pub const DEPARTED: usize = 2 * CLUSTER_VMS;
/// Most disks of a VM.
pub const DISKS: usize = 16;
/// Most rules of a VM, over all its NICs: with as many members as it may have, a record with all their rules (25 bytes
/// each) is well below [`CONTROL_MESSAGE_BYTES`].
pub const RULES: usize = 64;
/// Most NICs of a VM.
pub const NICS: usize = 8;
/// Longest name of a VM, wire, site or cluster, bytes.
pub const NAME_BYTES: usize = 63;
/// Largest guest memory, bytes (16 TiB: page indexes fit in 32 bits).
pub const GUEST_MEMORY_BYTES: u64 = 1 << 44;
/// Longest cause or other free text on the wire, bytes.
pub const TEXT_BYTES: usize = 1024;
/// Largest stored device state, bytes.
pub const DEVICE_STATE_BYTES: usize = 256 << 20;
/// Most clusters whose records one node keeps, tombstones included.
pub const CLUSTERS: usize = 16_384;
/// Most routes of the table, tombstones included.
pub const ROUTES: usize = 65_536;
/// Most (VM, epoch) pairs in one routing message: 25 bytes each at most.
pub const ROUTES_PER_HAVE: usize = 16_384;
/// Most whole entries in one routing message: 750 bytes each at most.
pub const ROUTES_PER_PUSH: usize = 1024;
/// Frames from guests to other hosts that wait for the driver.
pub const TUNNEL_QUEUE_FRAMES: usize = 1024;
/// Frames that wait in the kernel at a wire's tunnel port.
pub const TUNNEL_PORT_FRAMES: u32 = 4096;
/// Frames that wait in the kernel for a guest: what arrives while it stands still.
pub const TAP_QUEUE_FRAMES: u32 = 20_000;
/// Guest pages that a source node keeps until the destinations have placed them, bytes, of all its
/// migrations: when it is full, QEMU's socket is not read.
pub const RELAY_STORE_BYTES: usize = 44 << 20;
/// What long compressed streams take of a node's memory, bytes, of all its migrations.
pub const RELAY_STREAM_BYTES: usize = 60 << 20;
/// Pages with content in one batch.
pub const BATCH_PAGES: usize = 256;
/// The same when a node has many migrations.
pub const BATCH_PAGES_LEAST: usize = 16;
/// Pages of zeros in one batch.
pub const BATCH_ZEROS: usize = 1 << 17;
/// Guest pages in one compressed message, bytes; less when a node has several migrations.
pub const LITERAL_BYTES: usize = 4 << 20;
/// Bytes of received messages that wait at a destination node to be placed, of all its migrations.
pub const PLACING_BYTES: usize = 16 << 20;
/// Contents that a destination remembers by id.
pub const KNOWN_CHUNKS: usize = 1 << 20;
/// Longest Ethernet frame on a wire, bytes: a jumbo frame with its header.
pub const FRAME_BYTES: usize = 9216;
/// Frames that wait for a NIC while it moves, bytes at each of the two hosts: later ones are dropped.
pub const CUTOVER_BYTES: usize = 32 << 20;
/// Broadcasts and multicasts of which the new host of a NIC remembers which copy came, each some 30 bytes.
pub const CUTOVER_GROUPS: usize = 65_536;

//! Named cases, and seeds with loss, delay, doubling, reordering and crashes.

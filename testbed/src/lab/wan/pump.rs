//! One direction of an emulated link at work: a thread that reads packets at one end, holds them, writes them at the other.
//!
//! Owns the packets in flight and the counters. Never spins: it sleeps in `ppoll` until a packet arrives or one is due.
//! Invariant: after [`Direction::cut`] has returned no packet comes out until [`Direction::restore`].

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::shaper::{LinkParams, Shaper, Verdict};
use super::tun::{MTU, Tun};

/// Packets read or written before the lock is given up once.
const BATCH: usize = 128;
/// Bytes in flight and queued, at most; beyond it packets count as dropped.
const HELD_BYTES_MAX: usize = 256 << 20;
/// Longest sleep, so that a stop request is seen.
const SLEEP_NS_MAX: u64 = 100_000_000;
/// With this many packets in flight a direction counts as busy.
const BUSY_PACKETS: usize = 16;
/// A busy direction naps for this part of its delay, within [`BUSY_NAP_NS`], and then serves all that came and all that
/// is due: a packet is late by at most that much on each side, its place in the rate is exact. An idle direction
/// serves every packet at its time.
const BUSY_NAP_PART: u64 = 40;
/// Shortest and longest nap of a busy direction.
const BUSY_NAP_NS: (u64, u64) = (100_000, 1_000_000);

/// What passed one direction since it was made. Bytes are bytes of IP packets (no link-layer header).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// Packets that the near end sent into the link.
    pub offered_packets: u64,
    /// Their bytes.
    pub offered_bytes: u64,
    /// Packets that used the link's rate: delivered, lost on the way, or still in flight. The WAN bill.
    pub carried_packets: u64,
    /// Their bytes.
    pub carried_bytes: u64,
    /// Packets that came out at the far end.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Packets dropped because the queue was full.
    pub queue_dropped: u64,
    /// Of these, UDP datagrams: nobody sends them again.
    pub udp_queue_dropped: u64,
    /// Packets lost at random, as the loss probability says.
    pub lost: u64,
    /// Packets dropped because the link was cut.
    pub cut_dropped: u64,
    /// Packets that the far kernel refused.
    pub write_failed: u64,
    /// CPU time of the direction's thread in microseconds.
    pub cpu_us: u64,
}

#[derive(Default)]
struct Counters {
    offered_packets: AtomicU64,
    offered_bytes: AtomicU64,
    carried_packets: AtomicU64,
    carried_bytes: AtomicU64,
    delivered_packets: AtomicU64,
    delivered_bytes: AtomicU64,
    queue_dropped: AtomicU64,
    udp_queue_dropped: AtomicU64,
    lost: AtomicU64,
    cut_dropped: AtomicU64,
    write_failed: AtomicU64,
    cpu_us: AtomicU64,
}

fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

struct Held {
    due: u64,
    len: usize,
    packet: Box<[u8; MTU]>,
}

impl Held {
    fn empty() -> Self {
        Self { due: 0, len: 0, packet: Box::new([0; MTU]) }
    }
}

struct State {
    shaper: Shaper,
    cut: bool,
    held: VecDeque<Held>,
    held_bytes: usize,
    free: Vec<Held>,
}

/// A running direction; shared between its thread and whoever sets and reads it.
pub struct Direction {
    from: Arc<Tun>,
    to: Arc<Tun>,
    state: Mutex<State>,
    counters: Counters,
    stop: AtomicBool,
    clock: Instant,
}

impl Direction {
    /// A direction that nothing drives yet; give it to a thread that calls [`Direction::run`].
    pub fn new(from: Arc<Tun>, to: Arc<Tun>, params: LinkParams, lane: u64) -> Self {
        let shaper = Shaper::new(params, lane);
        let state =
            State { shaper, cut: false, held: VecDeque::new(), held_bytes: 0, free: Vec::new() };
        let counters = Counters::default();
        Self {
            from,
            to,
            state: Mutex::new(state),
            counters,
            stop: AtomicBool::new(false),
            clock: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// Asks the thread to end; it does so within 100 ms.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Drops everything queued and in flight, and everything that comes, until [`Direction::restore`].
    pub fn cut(&self) {
        let mut state = self.lock();
        state.cut = true;
        bump(&self.counters.cut_dropped, state.held.len() as u64);
        while let Some(held) = state.held.pop_front() {
            state.free.push(held);
        }
        state.held_bytes = 0;
        let now = self.now();
        state.shaper.reset(now);
    }

    /// Ends a cut. What arrives from now on passes.
    pub fn restore(&self) {
        self.lock().cut = false;
    }

    /// Changes the parameters for packets that arrive from now on.
    pub fn set(&self, change: impl FnOnce(&mut LinkParams)) {
        self.lock().shaper.set(change);
    }

    /// Present parameters.
    pub fn params(&self) -> LinkParams {
        self.lock().shaper.params().clone()
    }

    /// Present counters, without stopping anything.
    pub fn stats(&self) -> DirectionStats {
        let c = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DirectionStats {
            offered_packets: get(&c.offered_packets),
            offered_bytes: get(&c.offered_bytes),
            carried_packets: get(&c.carried_packets),
            carried_bytes: get(&c.carried_bytes),
            delivered_packets: get(&c.delivered_packets),
            delivered_bytes: get(&c.delivered_bytes),
            queue_dropped: get(&c.queue_dropped),
            udp_queue_dropped: get(&c.udp_queue_dropped),
            lost: get(&c.lost),
            cut_dropped: get(&c.cut_dropped),
            write_failed: get(&c.write_failed),
            cpu_us: get(&c.cpu_us),
        }
    }

    /// The thread's body: works until [`Direction::stop`] or until the device is gone.
    pub fn run(&self) {
        prefer_this_thread();
        while !self.stop.load(Ordering::Relaxed) {
            let mut state = self.lock();
            self.deliver(&mut state);
            let Ok(more) = self.accept(&mut state) else {
                return;
            };
            let due = state.held.front().map(|held| held.due);
            let busy = state.held.len() >= BUSY_PACKETS;
            let part = state.shaper.params().delay_us * 1000 / BUSY_NAP_PART;
            drop(state);
            self.counters.cpu_us.store(thread_cpu_us(), Ordering::Relaxed);
            match due {
                _ if more => {}
                Some(_) if busy => nap(&mut [], part.clamp(BUSY_NAP_NS.0, BUSY_NAP_NS.1)),
                Some(due) => self.until_packet_or(due.saturating_sub(self.now())),
                None => self.until_packet_or(SLEEP_NS_MAX),
            }
        }
    }

    fn until_packet_or(&self, sleep_ns: u64) {
        nap(&mut [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)], sleep_ns.min(SLEEP_NS_MAX));
    }

    /// Writes what is due.
    fn deliver(&self, state: &mut State) {
        for _ in 0..BATCH {
            let now = self.now();
            if state.held.front().is_none_or(|held| held.due > now) {
                return;
            }
            let Some(held) = state.held.pop_front() else {
                return;
            };
            state.held_bytes -= held.len;
            match self.to.write(&held.packet[..held.len]) {
                Ok(()) => {
                    bump(&self.counters.delivered_packets, 1);
                    bump(&self.counters.delivered_bytes, held.len as u64);
                }
                Err(_) => bump(&self.counters.write_failed, 1),
            }
            state.free.push(held);
        }
    }

    /// Reads what has arrived; true: there may be more. Err: the device is gone.
    fn accept(&self, state: &mut State) -> std::io::Result<bool> {
        for _ in 0..BATCH {
            let mut held = state.free.pop().unwrap_or_else(Held::empty);
            match self.from.read(&mut held.packet[..]) {
                Ok(len) => held.len = len,
                Err(error) => {
                    state.free.push(held);
                    return match error.kind() {
                        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(false),
                        _ => Err(error),
                    };
                }
            }
            self.admit(state, held);
        }
        Ok(true)
    }

    fn admit(&self, state: &mut State, mut held: Held) {
        let counters = &self.counters;
        bump(&counters.offered_packets, 1);
        bump(&counters.offered_bytes, held.len as u64);
        if state.cut {
            bump(&counters.cut_dropped, 1);
            state.free.push(held);
            return;
        }
        let verdict = match state.held_bytes + held.len {
            bytes if bytes > HELD_BYTES_MAX => Verdict::QueueFull,
            _ => state.shaper.offer(self.now(), held.len),
        };
        if verdict == Verdict::QueueFull {
            bump(&counters.queue_dropped, 1);
            // Version 4 and protocol of the IP header.
            let udp = held.packet[0] >> 4 == 4 && held.packet[9] == 17;
            bump(&counters.udp_queue_dropped, u64::from(udp));
            state.free.push(held);
            return;
        }
        bump(&counters.carried_packets, 1);
        bump(&counters.carried_bytes, held.len as u64);
        if let Verdict::Deliver(due) = verdict {
            held.due = due;
            state.held_bytes += held.len;
            state.held.push_back(held);
        } else {
            bump(&counters.lost, 1);
            state.free.push(held);
        }
    }
}

/// Sleeps until one of `fds` is ready, at most `sleep_ns` (below one second).
fn nap(fds: &mut [PollFd<'_>], sleep_ns: u64) {
    // An interrupted or failed poll only means another turn of the loop.
    let _ = nix::poll::ppoll(fds, Some(TimeSpec::new(0, sleep_ns as i64)), None);
}

/// The emulator must not be late because guests keep the CPUs busy: real-time class, or at least a good nice value.
fn prefer_this_thread() {
    // SAFETY: plain system calls on the calling thread; the parameter block outlives its call.
    unsafe {
        let param = libc::sched_param { sched_priority: 1 };
        if libc::sched_setscheduler(0, libc::SCHED_RR, &param) != 0 {
            libc::setpriority(libc::PRIO_PROCESS, 0, -19);
        }
    }
}

fn thread_cpu_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the timespec outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

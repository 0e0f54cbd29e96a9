//! A few threads for hashing, compressing and placing.
//!
//! Owns the threads and one queue of jobs with two priorities. Never decides how many jobs there
//! may be: each caller bounds what it puts in. Invariant: after `close` no job is begun, and the
//! threads end when the last handle is gone.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Locks, also if a thread panicked while it held the lock: the panic itself ends the session.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Queue<J> {
    urgent: VecDeque<J>,
    other: VecDeque<J>,
    closed: bool,
}

struct Shared<J> {
    queue: Mutex<Queue<J>>,
    filled: Condvar,
}

/// The pool; dropping it ends the threads after their present job.
pub(super) struct Pool<J> {
    shared: Arc<Shared<J>>,
}

impl<J: Send + 'static> Pool<J> {
    /// Starts `threads` threads that run `work` on each job; `work` is made once per thread.
    pub(super) fn start<W: FnMut(J) + Send + 'static>(
        name: &str,
        threads: usize,
        mut work: impl FnMut() -> W,
    ) -> io::Result<Self> {
        let queue = Queue { urgent: VecDeque::new(), other: VecDeque::new(), closed: false };
        let shared = Arc::new(Shared { queue: Mutex::new(queue), filled: Condvar::new() });
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            let mut work = work();
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                while let Some(job) = shared.next() {
                    work(job);
                }
            })?;
        }
        Ok(Self { shared })
    }

    /// Adds a job; urgent ones overtake the others.
    pub(super) fn put(&self, job: J, urgent: bool) {
        let mut queue = lock(&self.shared.queue);
        if urgent {
            queue.urgent.push_back(job)
        } else {
            queue.other.push_back(job)
        }
        self.shared.filled.notify_one();
    }
}

impl<J> Shared<J> {
    fn next(&self) -> Option<J> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(job) = queue.urgent.pop_front() {
                return Some(job);
            }
            if let Some(job) = queue.other.pop_front() {
                return Some(job);
            }
            queue = self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J> Drop for Pool<J> {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.filled.notify_all();
    }
}

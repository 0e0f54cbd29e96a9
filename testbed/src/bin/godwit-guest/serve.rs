//! The servers of the agent: echoes on UDP and TCP, and the control channels.
//!
//! Owns the sockets and the second serial port. Never decides what a request means. Bounded: lines by `MAX_LINE`,
//! connections by `MAX_CONNECTIONS` for each port.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use godwit_testbed::guest::wire::{Envelope, MAX_LINE, Reply};
use godwit_testbed::lab::prober::Counter;

/// Connections served at once on one port.
const MAX_CONNECTIONS: usize = 32;
/// Room for datagrams that were not read yet, bytes as the kernel counts them.
const UDP_BUFFER: libc::c_int = 16 << 20;
/// Largest UDP datagram.
const MAX_DATAGRAM: usize = 65_536;

/// Answers one request.
pub type Handler = Arc<dyn Fn(Envelope) -> Reply + Send + Sync>;

/// Echoes every datagram to its sender, as it came.
pub fn udp_echo(port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    // What waited for a guest that moved comes at once: room for some seconds of it.
    set_buffer(&socket, UDP_BUFFER);
    spawn("udp-echo", move || {
        let mut datagram = vec![0; MAX_DATAGRAM];
        loop {
            // Errors here are ICMP replies to earlier echoes or a full queue: the next datagram is served all the same.
            if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(&datagram[..length], from);
            }
        }
    })
}

/// Counts numbered datagrams and answers none.
pub fn udp_sink(port: u16) -> io::Result<Arc<Mutex<Counter>>> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    set_buffer(&socket, UDP_BUFFER);
    let counter = Arc::new(Mutex::new(Counter::default()));
    let counts = Arc::clone(&counter);
    spawn("udp-sink", move || {
        let mut datagram = vec![0; MAX_DATAGRAM];
        loop {
            if let Ok(length) = socket.recv(&mut datagram) {
                let mut counter = counts.lock().unwrap_or_else(PoisonError::into_inner);
                counter.receive(&datagram[..length], 0);
            }
        }
    })?;
    Ok(counter)
}

/// Echoes every byte of every connection.
pub fn tcp_echo(port: u16) -> io::Result<()> {
    tcp_server("tcp-echo", port, |mut stream| {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut bytes) {
            stream.write_all(&bytes[..length])?;
        }
        Ok(())
    })
}

/// Serves requests over TCP.
pub fn tcp_control(port: u16, handler: Handler) -> io::Result<()> {
    tcp_server("tcp-control", port, move |stream| {
        let replies = stream.try_clone()?;
        serve_lines(stream, replies, &handler)
    })
}

/// Serves requests over a serial port. Returns an error only if the port is not there.
pub fn serial_control(path: &str, handler: Handler) -> io::Result<()> {
    let port = File::options().read(true).write(true).open(path)?;
    set_raw(&port)?;
    spawn("serial-control", move || {
        loop {
            let lines = port.try_clone().and_then(|input| {
                let output = port.try_clone()?;
                serve_lines(input, output, &handler)
            });
            // A serial port has no end; after an error the next line starts afresh.
            if lines.is_err() {
                thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    })
}

fn serve_lines(input: impl Read, mut output: impl Write, handler: &Handler) -> io::Result<()> {
    let mut input = BufReader::new(input);
    loop {
        let mut line = Vec::new();
        let limit = MAX_LINE as u64 + 1;
        if (&mut input).take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim_ascii();
        // A harness that connects sends an empty line first, to end what an earlier one may have left.
        if line.is_empty() {
            continue;
        }
        let reply = match serde_json::from_slice::<Envelope>(line) {
            Ok(envelope) => handler(envelope),
            Err(error) => Reply::refuse(0, format!("not a request: {error}")),
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(b'\n');
        output.write_all(&text)?;
        output.flush()?;
    }
}

fn tcp_server<F>(name: &'static str, port: u16, serve: F) -> io::Result<()>
where
    F: Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let serve = Arc::new(serve);
    let open = Arc::new(AtomicUsize::new(0));
    spawn(name, move || {
        for stream in listener.incoming().flatten() {
            if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                open.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (serve, open_here) = (Arc::clone(&serve), Arc::clone(&open));
            let started = spawn(name, move || {
                let _ = stream.set_nodelay(true);
                // The end of a session, orderly or not, concerns only that session.
                let _ = serve(stream);
                open_here.fetch_sub(1, Ordering::Relaxed);
            });
            if started.is_err() {
                open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

/// As much room for what arrives as is asked for. (More to send than the kernel allows by itself would only be dropped
/// further down, where nobody counts.)
fn set_buffer(socket: &UdpSocket, bytes: libc::c_int) {
    // SAFETY: the option value is one int that outlives the call.
    unsafe {
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        let value = (&raw const bytes).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, length);
    }
}

/// No echo, no line editing, no translation: bytes as they are.
fn set_raw(port: &File) -> io::Result<()> {
    let fd = port.as_raw_fd();
    // SAFETY: termios is plain data filled by tcgetattr, and the descriptor is open for the whole call.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(fd, &mut settings) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&mut settings);
        settings.c_cflag |= libc::CLOCAL | libc::CREAD;
        libc::cfsetspeed(&mut settings, libc::B115200);
        if libc::tcsetattr(fd, libc::TCSANOW, &settings) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

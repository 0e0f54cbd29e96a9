//! The few nftables messages that [`super::guard`] and [`super::filter`] need, as bytes.
//!
//! Owns the encoding (numbers from `linux/netfilter/nf_tables.h`) and the reading of answers; knows no
//! rule of ours. Invariant: a batch is begun and ended once, and each message in it asks for an answer.

use std::io;
use std::mem::MaybeUninit;

use socket2::Socket;

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const DELCHAIN: u16 = 5;
const NEWRULE: u16 = 6;
const DELRULE: u16 = 8;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;

const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const CREATE: u16 = libc::NLM_F_CREATE as u16;
const EXCL: u16 = libc::NLM_F_EXCL as u16;
const APPEND: u16 = libc::NLM_F_APPEND as u16;

/// Set elements in one message: an attribute's length is 16 bits.
const ELEMENTS: usize = 1024;
/// The priority of a chain that comes before others.
const EARLY: i32 = -10;
/// Register 1, which every expression here goes through.
const REGISTER: u32 = 1;

/// What a rule can say; all must hold, in order.
pub(super) enum Expression<'a> {
    /// IPv4 is 2, IPv6 is 10.
    NetworkProtocol(u8),
    NetworkProtocolNot(u8),
    /// The type of the Ethernet frame.
    EtherProtocol(u16),
    TransportProtocol(u8),
    DestinationPort(u16),
    /// The first byte behind the network header is in this range.
    FirstByte(u8, u8),
    /// The source address at this offset is in the network.
    SourceIn {
        offset: u32,
        mask: Vec<u8>,
        network: Vec<u8>,
    },
    /// The bytes of the source address are not an element of the set.
    SourceNotIn {
        offset: u32,
        length: u32,
        set: &'a str,
    },
    /// The name of the device it came in by begins with this.
    InputNamed(&'a str),
    /// It came in by another device than this.
    InputNotNamed(&'a str),
    /// The name of the device it goes out by begins with this.
    OutputNamed(&'a str),
    /// It goes out by another device than this.
    OutputNotNamed(&'a str),
    TransportProtocolNot(u8),
    EtherDestination([u8; 6]),
    /// It is a broadcast or a multicast.
    Group,
    MarkNot(u32),
    /// Sent by the device of this index, in place of the one that it was for.
    SendBy(u32),
    /// What an ARP packet is: 1 asks.
    ArpOperation(u16),
    /// Writes over the Ethernet header, from this offset on.
    SetEther(u32, &'a [u8]),
    /// Writes over the network header, from this offset on; no checksum is adapted.
    SetNetwork(u32, &'a [u8]),
    /// Taken for one to this host, whatever its Ethernet header says.
    ToHost,
    Count,
    Accept,
    Drop,
}

/// A transaction under construction.
pub(super) struct Batch {
    bytes: Vec<u8>,
    messages: u32,
}

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), messages: 0 };
        batch.raw(BATCH_BEGIN, REQUEST, 0, SUBSYSTEM, &[]);
        batch
    }

    /// The bytes, and how many answers to expect.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32) {
        self.raw(BATCH_END, REQUEST, 0, SUBSYSTEM, &[]);
        (self.bytes, self.messages)
    }

    fn raw(&mut self, kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) {
        let length = (20 + body.len()) as u32;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(self.messages.to_ne_bytes());
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(body);
        pad(&mut self.bytes);
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, body: &[u8]) {
        self.messages += 1;
        self.raw(SUBSYSTEM << 8 | kind, REQUEST | ACK | flags, family, 0, body);
    }

    pub(super) fn table(&mut self, family: u8, table: &str, exclusive: bool) {
        let flags = if exclusive { CREATE | EXCL } else { CREATE };
        self.message(NEWTABLE, flags, family, &text(1, table));
    }

    pub(super) fn delete_table(&mut self, family: u8, table: &str) {
        self.message(DELTABLE, 0, family, &text(1, table));
    }

    /// A filter chain on a hook (1: input, 2: forward, in all but the netdev family), priority 0, policy accept.
    pub(super) fn chain(&mut self, family: u8, table: &str, chain: &str, hook: u32) {
        let hook = [number(1, hook), number(2, 0)].concat();
        let body =
            [text(1, table), text(3, chain), nested(4, &hook), number(5, 1), text(7, "filter")];
        self.message(NEWCHAIN, CREATE, family, &body.concat());
    }

    /// A filter chain on the way out of a device (hook 1 of the netdev family), called as it is, policy accept.
    pub(super) fn egress_chain(&mut self, family: u8, table: &str, device: &str) {
        self.device_chain(family, table, device, (1, 0), device);
    }

    /// A chain in front of that.
    pub(super) fn early_chain(&mut self, family: u8, table: &str, chain: &str, device: &str) {
        self.device_chain(family, table, chain, (1, EARLY), device);
    }

    /// A filter chain on the way in from a device (hook 0 of the netdev family), policy accept.
    pub(super) fn ingress_chain(&mut self, family: u8, table: &str, chain: &str, device: &str) {
        self.device_chain(family, table, chain, (0, 0), device);
    }

    fn device_chain(
        &mut self,
        family: u8,
        table: &str,
        chain: &str,
        (hook, priority): (u32, i32),
        device: &str,
    ) {
        let priority = priority.cast_unsigned();
        let hook = [number(1, hook), number(2, priority), text(3, device)].concat();
        let body =
            [text(1, table), text(3, chain), nested(4, &hook), number(5, 1), text(7, "filter")];
        self.message(NEWCHAIN, CREATE, family, &body.concat());
    }

    pub(super) fn delete_chain(&mut self, family: u8, table: &str, chain: &str) {
        self.message(DELCHAIN, 0, family, &[text(1, table), text(3, chain)].concat());
    }

    /// Removes all rules of a chain.
    pub(super) fn flush(&mut self, family: u8, table: &str, chain: &str) {
        self.message(DELRULE, 0, family, &[text(1, table), text(2, chain)].concat());
    }

    pub(super) fn set(&mut self, family: u8, table: &str, set: &str, key: u32, length: u32) {
        let id = self.messages + 1;
        let body = [
            text(1, table),
            text(2, set),
            number(3, 0),
            number(4, key),
            number(5, length),
            number(10, id),
        ];
        self.message(NEWSET, CREATE, family, &body.concat());
    }

    pub(super) fn elements(&mut self, family: u8, table: &str, set: &str, keys: &[Vec<u8>]) {
        for part in keys.chunks(ELEMENTS) {
            let list: Vec<u8> =
                part.iter().flat_map(|key| nested(1, &nested(1, &attribute(1, key)))).collect();
            let body = [text(1, table), text(2, set), nested(3, &list)].concat();
            self.message(NEWSETELEM, CREATE, family, &body);
        }
    }

    pub(super) fn rule(&mut self, family: u8, table: &str, chain: &str, all: &[Expression<'_>]) {
        let list: Vec<u8> = all.iter().flat_map(encode).collect();
        let body = [text(1, table), text(2, chain), nested(4, &list)].concat();
        self.message(NEWRULE, CREATE | APPEND, family, &body);
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len() + 8);
    out.extend(((value.len() + 4) as u16).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    pad(&mut out);
    out
}

fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    attribute(kind | libc::NLA_F_NESTED as u16, value)
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn expression(name: &str, data: &[u8]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, data)].concat())
}

/// Loads packet metadata `key` and compares it; a shorter value compares the beginning.
fn meta(key: u32, value: &[u8]) -> Vec<u8> {
    [load_meta(key), equals(value)].concat()
}

fn meta_not(key: u32, value: &[u8]) -> Vec<u8> {
    [load_meta(key), compare(1, value)].concat()
}

fn load_meta(key: u32) -> Vec<u8> {
    expression("meta", &[number(1, REGISTER), number(2, key)].concat())
}

/// A device's whole name, as metadata has it: up to the zero.
fn whole(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// Puts the bytes into the register.
fn put(value: &[u8]) -> Vec<u8> {
    let data = [number(1, REGISTER), nested(2, &attribute(1, value))];
    expression("immediate", &data.concat())
}

/// Writes over a header.
fn write(base: u32, offset: u32, value: &[u8]) -> Vec<u8> {
    let length = value.len() as u32;
    let data = [number(2, base), number(3, offset), number(4, length), number(5, REGISTER)];
    [put(value), expression("payload", &data.concat())].concat()
}

fn equals(value: &[u8]) -> Vec<u8> {
    compare(0, value)
}

/// 0: equal; 1: not equal; 3: at most; 5: at least.
fn compare(how: u32, value: &[u8]) -> Vec<u8> {
    let data = [number(1, REGISTER), number(2, how), nested(3, &attribute(1, value))];
    expression("cmp", &data.concat())
}

/// Keeps these bits of the register.
fn masked(mask: &[u8]) -> Vec<u8> {
    let nothing = vec![0; mask.len()];
    let data = [
        number(1, REGISTER),
        number(2, REGISTER),
        number(3, mask.len() as u32),
        nested(4, &attribute(1, mask)),
        nested(5, &attribute(1, &nothing)),
    ];
    expression("bitwise", &data.concat())
}

fn verdict(code: u32) -> Vec<u8> {
    let verdict = nested(2, &number(1, code));
    expression("immediate", &[number(1, 0), nested(2, &verdict)].concat())
}

fn payload(base: u32, offset: u32, length: u32) -> Vec<u8> {
    let data = [number(1, REGISTER), number(2, base), number(3, offset), number(4, length)];
    expression("payload", &data.concat())
}

fn encode(one: &Expression<'_>) -> Vec<u8> {
    match one {
        Expression::NetworkProtocol(number) => meta(15, &[*number]),
        Expression::NetworkProtocolNot(number) => meta_not(15, &[*number]),
        Expression::EtherProtocol(number) => meta(1, &number.to_be_bytes()),
        Expression::FirstByte(first, last) => {
            [payload(2, 0, 1), compare(5, &[*first]), compare(3, &[*last])].concat()
        }
        Expression::SourceIn { offset, mask, network } => {
            [payload(1, *offset, mask.len() as u32), masked(mask), equals(network)].concat()
        }
        Expression::TransportProtocol(number) => meta(16, &[*number]),
        Expression::TransportProtocolNot(number) => meta_not(16, &[*number]),
        Expression::InputNamed(prefix) => meta(6, prefix.as_bytes()),
        Expression::InputNotNamed(name) => meta_not(6, &whole(name)),
        Expression::OutputNamed(prefix) => meta(7, prefix.as_bytes()),
        Expression::OutputNotNamed(name) => meta_not(7, &whole(name)),
        Expression::EtherDestination(mac) => [payload(0, 0, 6), equals(mac)].concat(),
        Expression::Group => [payload(0, 0, 1), masked(&[1]), equals(&[1])].concat(),
        Expression::MarkNot(mark) => meta_not(3, &mark.to_ne_bytes()),
        Expression::SendBy(index) => {
            [put(&index.to_ne_bytes()), expression("fwd", &number(1, REGISTER))].concat()
        }
        Expression::ArpOperation(operation) => {
            [payload(1, 6, 2), equals(&operation.to_be_bytes())].concat()
        }
        Expression::SetEther(offset, bytes) => write(0, *offset, bytes),
        Expression::SetNetwork(offset, bytes) => write(1, *offset, bytes),
        Expression::ToHost => {
            [put(&[0]), expression("meta", &[number(2, 19), number(3, REGISTER)].concat())].concat()
        }
        Expression::DestinationPort(port) => {
            [payload(2, 2, 2), equals(&port.to_be_bytes())].concat()
        }
        Expression::SourceNotIn { offset, length, set } => {
            let data = [text(1, set), number(2, REGISTER), number(5, 1)].concat();
            [payload(1, *offset, *length), expression("lookup", &data)].concat()
        }
        Expression::Count => expression("counter", &[]),
        Expression::Accept => verdict(1),
        Expression::Drop => verdict(0),
    }
}

/// Throws away what is waiting in the socket.
pub(super) fn drain(socket: &Socket) -> io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); 64];
    loop {
        match socket.recv_with_flags(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Reads `expected` acknowledgements; the first error is the transaction's.
pub(super) fn read_acks(socket: &Socket, expected: u32) -> io::Result<()> {
    let mut buffer = vec![MaybeUninit::<u8>::uninit(); 16 << 10];
    let mut seen = 0;
    while seen < expected {
        let length = socket.recv(&mut buffer)?;
        // SAFETY: the kernel has written the first `length` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        seen += count_acks(bytes)?;
    }
    Ok(())
}

/// How many acknowledgements a datagram holds, or the error in it.
fn count_acks(mut bytes: &[u8]) -> io::Result<u32> {
    let mut seen = 0;
    while let Some((header, _)) = bytes.split_first_chunk::<16>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        if length < 16 || length > bytes.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        if i32::from(kind) == libc::NLMSG_ERROR {
            let code = bytes.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
            match code {
                Some(0) => seen += 1,
                Some(code) => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
                None => return Err(io::Error::from(io::ErrorKind::InvalidData)),
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_padded_and_counted() {
        let mut batch = Batch::new();
        batch.table(1, "abc", true);
        let (bytes, answers) = batch.finish();
        assert_eq!(answers, 1);
        assert_eq!(bytes.len(), 20 + 28 + 20);
        assert_eq!(bytes[20..24], 28_u32.to_ne_bytes());
        assert_eq!(&bytes[40..48], b"\x08\x00\x01\x00abc\x00");
    }

    #[test]
    fn answers_are_read_with_care() {
        let answer = |code: i32| {
            let mut b = 20_u32.to_ne_bytes().to_vec();
            b.extend(2_u16.to_ne_bytes());
            b.extend([0; 10]);
            b.extend(code.to_ne_bytes());
            b
        };
        assert_eq!(count_acks(&[answer(0), answer(0)].concat()).unwrap(), 2);
        let error = count_acks(&[answer(0), answer(-libc::EEXIST)].concat()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        assert!(count_acks(&[1; 16]).is_err());
        assert!(count_acks(&[0; 40]).is_err());
        assert_eq!(count_acks(&answer(0)[..10]).unwrap(), 0);
    }
}

//! What a server answers before transmission.
//!
//! Owns what a client has chosen so far. Never touches the socket. Invariant: an option gets exactly
//! one last reply, and transmission begins only with the one export that there is.

use super::super::codec::handshake::{
    ClientOption, Info, InfoRequest, MetaRequest, OptionReply, Refusal, encode_export_name_answer,
    export_flag,
};
use super::super::codec::{BASE_ALLOCATION, BlockSize};
use super::Export;

/// The id of the metadata context that can be chosen.
pub(super) const CONTEXT: u32 = 1;

/// What was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Reads are answered with chunks.
    pub structured: bool,
    /// The client chose `base:allocation`.
    pub status: bool,
}

/// What comes after an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another one.
    Option,
    /// Requests.
    Transmission(Terms),
    /// Nothing.
    Leave,
}

pub(super) struct Haggler<'a> {
    name: &'a str,
    size: u64,
    block: BlockSize,
    flags: u16,
    zeros: bool,
    terms: Terms,
}

impl<'a> Haggler<'a> {
    /// `zeros`: the client wants them behind the answer to `EXPORT_NAME`.
    pub(super) fn new(name: &'a str, export: &dyn Export, zeros: bool) -> Self {
        use export_flag as flag;
        let writes = match export.read_only() {
            true => flag::READ_ONLY,
            false => flag::TRIM | flag::WRITE_ZEROES | flag::FAST_ZERO,
        };
        let always = flag::HAS_FLAGS | flag::FLUSH | flag::FUA | flag::MULTI_CONN | flag::CACHE;
        Self {
            name,
            size: export.size(),
            block: export.block_size(),
            flags: always | writes,
            zeros,
            terms: Terms { structured: false, status: false },
        }
    }

    /// Appends the replies to an option.
    pub(super) fn option(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let mut reply = |reply: OptionReply| reply.encode(number, out);
        let option = match ClientOption::decode(number, data) {
            Ok(option) => option,
            Err(error) => {
                reply(refused(Refusal::Invalid, error.to_string()));
                return Next::Option;
            }
        };
        match option {
            ClientOption::ExportName(name) => return self.export_name(&name, out),
            ClientOption::Abort => {
                reply(OptionReply::Ack);
                return Next::Leave;
            }
            ClientOption::List => {
                reply(OptionReply::Server(self.name.to_owned()));
                reply(OptionReply::Ack);
            }
            ClientOption::Info(request) => {
                self.describe(&request, &mut reply);
            }
            ClientOption::Go(request) => {
                if self.describe(&request, &mut reply) {
                    return Next::Transmission(self.terms);
                }
            }
            ClientOption::StructuredReply => {
                self.terms.structured = true;
                reply(OptionReply::Ack);
            }
            ClientOption::ListMeta(request) => self.meta(&request, false, &mut reply),
            ClientOption::SetMeta(request) => self.meta(&request, true, &mut reply),
            ClientOption::Other(_) => {
                reply(refused(Refusal::Unsupported, "not supported".to_owned()));
            }
        }
        Next::Option
    }

    /// Appends the reply to an option whose data were passed over.
    pub(super) fn too_big(&self, number: u32, out: &mut Vec<u8>) -> Next {
        refused(Refusal::TooBig, "too long".to_owned()).encode(number, out);
        Next::Option
    }

    fn flags(&self) -> u16 {
        self.flags | if self.terms.structured { export_flag::DF } else { 0 }
    }

    fn export_name(&self, name: &str, out: &mut Vec<u8>) -> Next {
        // The protocol has no error here but the end of the connection.
        if name != self.name {
            return Next::Leave;
        }
        encode_export_name_answer(self.size, self.flags(), self.zeros, out);
        Next::Transmission(self.terms)
    }

    /// Whether the export is the one that is here.
    fn describe(&self, request: &InfoRequest, reply: &mut impl FnMut(OptionReply)) -> bool {
        if request.name != self.name {
            reply(unknown());
            return false;
        }
        reply(OptionReply::Info(Info::Export { size: self.size, flags: self.flags() }));
        if request.items.contains(&Info::NAME) {
            reply(OptionReply::Info(Info::Name(self.name.to_owned())));
        }
        if request.items.contains(&Info::BLOCK_SIZE) {
            reply(OptionReply::Info(Info::BlockSize(self.block)));
        }
        reply(OptionReply::Ack);
        true
    }

    fn meta(&mut self, request: &MetaRequest, set: bool, reply: &mut impl FnMut(OptionReply)) {
        if set {
            // Also a request that fails undoes what was chosen.
            self.terms.status = false;
        }
        if !self.terms.structured {
            reply(refused(Refusal::Invalid, "structured replies come first".to_owned()));
            return;
        }
        if request.export != self.name {
            reply(unknown());
            return;
        }
        let all = !set && request.queries.is_empty();
        let wanted = |query: &String| query == BASE_ALLOCATION || (!set && query == "base:");
        if all || request.queries.iter().any(wanted) {
            self.terms.status |= set;
            let id = if set { CONTEXT } else { 0 };
            reply(OptionReply::Meta { id, name: BASE_ALLOCATION.to_owned() });
        }
        reply(OptionReply::Ack);
    }
}

fn refused(why: Refusal, text: String) -> OptionReply {
    OptionReply::Refused { why, text }
}

fn unknown() -> OptionReply {
    refused(Refusal::Unknown, "no such export".to_owned())
}

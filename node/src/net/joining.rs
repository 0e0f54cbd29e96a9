//! The join handshake on the wire: the joiner's call and the issuer's answer.
//!
//! Owns the two ends of the join stream. Never decides; that is `admission`'s.

use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::Swarm;
use libp2p::swarm::SwarmEvent;
use tokio::time::timeout;

use godwit_protocol::id::HostId;

use super::admission::{self, AdmissionError, JoinReply, JoinRequest, Refusal};
use super::hello::{StreamError, message, read_message};
use super::identity::{Identity, peer_of};
use super::shared::Shared;
use super::swarm::{Behaviour, JOIN_PROTOCOL, Via, build, dial};
use super::token::Token;

const REQUEST_BYTES: usize = 4096;
const REPLY_BYTES: usize = 1 << 20;
/// One side of the exchange, including the issuer's writes to disk.
const STEP: Duration = Duration::from_secs(10);
/// All of a join.
const WHOLE: Duration = Duration::from_secs(30);

/// Asks the token's issuer to be admitted.
///
/// # Errors
/// [`AdmissionError::Unreachable`] and whatever makes the exchange fail.
pub(super) async fn ask(
    me: &Identity,
    token: &Token,
    request: &JoinRequest,
) -> Result<JoinReply, AdmissionError> {
    let shown: Vec<_> = token.addresses.iter().map(ToString::to_string).collect();
    let unreachable =
        |cause: String| AdmissionError::Unreachable { addresses: shown.join(", "), cause };
    let peer = peer_of(token.issuer).ok_or(super::token::TokenError::Malformed)?;
    let mut swarm = build(me).map_err(|e| unreachable(e.to_string()))?;
    let exchange = async {
        connect(&mut swarm, token, peer).await.map_err(&unreachable)?;
        let mut control = swarm.behaviour().streams.new_control();
        let talk = async {
            let mut stream = control
                .open_stream(peer, JOIN_PROTOCOL)
                .await
                .map_err(|e| unreachable(e.to_string()))?;
            let bytes = message(request, REQUEST_BYTES)
                .map_err(|e| AdmissionError::BadWelcome(e.to_string()))?;
            let io = |e: std::io::Error| unreachable(e.to_string());
            stream.write_all(&bytes).await.map_err(io)?;
            stream.flush().await.map_err(io)?;
            let reply = read_message::<_, JoinReply, REPLY_BYTES>(&mut stream).await;
            reply.map_err(|e: StreamError| unreachable(e.to_string()))
        };
        // The swarm has to be driven while the stream is used.
        let driven = async {
            loop {
                let _ = swarm.select_next_some().await;
            }
        };
        tokio::select! {
            reply = talk => reply,
            () = driven => Err(unreachable("the connection ended".to_owned())),
        }
    };
    let timed = timeout(WHOLE, exchange).await;
    timed.unwrap_or_else(|_| Err(unreachable(format!("no answer in {} s", WHOLE.as_secs()))))
}

async fn connect(
    swarm: &mut Swarm<Behaviour>,
    token: &Token,
    peer: libp2p::PeerId,
) -> Result<(), String> {
    let mut last = "no address".to_owned();
    for via in [Via::Quic, Via::Tcp] {
        if !dial(swarm, peer, token.addresses.iter(), via) {
            continue;
        }
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { .. } => return Ok(()),
                SwarmEvent::OutgoingConnectionError { error, .. } => {
                    last = error.to_string();
                    break;
                }
                _ => {}
            }
        }
    }
    Err(last)
}

/// Answers one joiner.
pub(super) async fn serve<S>(shared: Arc<Shared>, host: HostId, mut stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let read = read_message::<_, JoinRequest, REQUEST_BYTES>(&mut stream);
    let request = match timeout(STEP, read).await {
        Ok(Ok(request)) => request,
        Ok(Err(cause)) => {
            tracing::debug!(%host, %cause, "a join request could not be read");
            return;
        }
        Err(_) => return,
    };
    let name = request.name.clone();
    let reply = match decide(&shared, host, request).await {
        Ok(reply) => {
            tracing::info!(%host, %name, "admitted a host");
            reply
        }
        Err(refusal) => {
            tracing::warn!(%host, %name, %refusal, "refused a host");
            JoinReply::Refused(refusal)
        }
    };
    let Ok(bytes) = message(&reply, REPLY_BYTES) else { return };
    let sent = timeout(STEP, async {
        stream.write_all(&bytes).await?;
        stream.close().await
    });
    if !matches!(sent.await, Ok(Ok(()))) {
        tracing::warn!(%host, "the answer to a join was lost; the host may repeat it");
    }
}

async fn decide(
    shared: &Arc<Shared>,
    host: HostId,
    request: JoinRequest,
) -> Result<JoinReply, Refusal> {
    let (state, roster) = (shared.state.clone(), shared.roster(Clone::clone));
    let lost = |e: &dyn std::fmt::Display| Refusal::Issuer(e.to_string());
    let (record, welcome) =
        tokio::task::spawn_blocking(move || admission::admit(&state, &roster, host, request))
            .await
            .map_err(|e| lost(&e))??;
    shared.learn(vec![record], Vec::new(), None).await;
    shared.save().await.map_err(|e| lost(&e))?;
    Ok(JoinReply::Welcome(welcome))
}

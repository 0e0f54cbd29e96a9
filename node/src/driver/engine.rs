//! The one task that runs the core: takes what happened, performs what the core commands.
//!
//! Owns the core. Invariant: a command is finished (persisted: flushed) before the next is begun.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_protocol::core::{Command, Core, Key, Value};
use godwit_protocol::id::{HostId, MigrationId};
use godwit_protocol::limits::STORED_BYTES;
use godwit_protocol::migrate::{Effect, Happened};
use godwit_protocol::wire::codec;
use godwit_protocol::wire::control::Control;
use godwit_protocol::wire::migrate::Body;
use tokio::sync::mpsc;

use super::node::{DriverError, Input, Node, RunOptions};
use super::worker::{Todo, Worker};
use super::{asks, cutover, hold, nics, off, on, restart, uplinks, wires};
use crate::net::NetEvent;

/// Things that happened and wait for the core.
pub(super) const INPUTS: usize = 1024;

/// The engine's own state.
struct Engine {
    node: Arc<Node>,
    core: Core,
    workers: BTreeMap<MigrationId, mpsc::Sender<Todo>>,
}

pub(super) async fn run(options: RunOptions) -> Result<(), DriverError> {
    restart::raise_descriptors();
    restart::bound_heaps();
    let started = restart::start(options).await?;
    let restart::Started { node, core, mut inputs, mut net_events, background } = started;
    let mut engine = Engine { node, core, workers: BTreeMap::new() };
    engine.perform().await?;
    let mut terminate = signal()?;
    tracing::info!(host = %engine.node.name, state = %engine.node.options.state.display(), "ready");
    loop {
        let due = engine.core.poll_timeout();
        let due = engine.node.started + Duration::from_micros(due.0);
        tokio::select! {
            biased;
            () = terminate.recv() => break,
            Some(event) = net_events.recv() => engine.net_event(event).await,
            Some(input) = inputs.recv() => engine.input(input).await?,
            () = tokio::time::sleep_until(due) => engine.core.timer(engine.node.now()),
        }
        engine.perform().await?;
    }
    tracing::info!("stopping; guests run on");
    drop(background);
    Ok(())
}

/// SIGINT or SIGTERM.
struct Terminate(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

impl Terminate {
    async fn recv(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

fn signal() -> Result<Terminate, DriverError> {
    use tokio::signal::unix::{SignalKind, signal};
    Ok(Terminate(
        signal(SignalKind::interrupt()).map_err(DriverError::of)?,
        signal(SignalKind::terminate()).map_err(DriverError::of)?,
    ))
}

impl Engine {
    async fn net_event(&mut self, event: NetEvent) {
        let now = self.node.now();
        match event {
            NetEvent::Connected(host) => {
                self.core.connected(now, host);
                uplinks::choose_again(&self.node).await;
            }
            NetEvent::Disconnected(host) => {
                self.node.asks.gone(host);
                self.node.frames.forget(host);
                self.core.disconnected(now, host);
                uplinks::choose_again(&self.node).await;
            }
            NetEvent::Message { from, msg } => match *msg {
                Control::Ask { number, ask } => {
                    asks::answer(&self.node, &mut self.core, now, from, number, ask);
                }
                Control::Answer { number, answer } => {
                    self.node.asks.answered(from, number, answer);
                }
                other => self.core.message(now, from, other),
            },
            NetEvent::MembersChanged => wires::members_changed(&self.node).await,
            NetEvent::Revoked(host) => {
                tracing::warn!(%host, "revoked");
                self.core.disconnected(now, host);
                wires::members_changed(&self.node).await;
            }
            NetEvent::VersionMismatch { .. } => {}
        }
    }

    async fn input(&mut self, input: Input) -> Result<(), DriverError> {
        let now = self.node.now();
        match input {
            Input::Job(job) => {
                let after = job(&mut self.core, now);
                self.perform().await?;
                after();
            }
            Input::Happened(id, happened) => self.core.happened(now, id, *happened),
            Input::Gone(id) => self.copy_gone(id).await,
        }
        Ok(())
    }

    /// A QEMU ended that was not told to.
    async fn copy_gone(&mut self, id: godwit_protocol::id::CopyId) {
        let Some(copy) = self.node.copies.get(id) else { return };
        if copy.qemu().exit().is_none() {
            return; // An earlier QEMU of a copy that was rebuilt.
        }
        let now = self.node.now();
        let vm = copy.vm();
        if let Some(migration) = self.core.migration_of(vm) {
            self.core.happened(now, migration, Happened::QemuGone { copy: id, ran: copy.ran() });
            if self.core.migration_of(vm).is_some() {
                return; // The copy's memory may be needed to build it again.
            }
        }
        tracing::warn!(vm = %copy.spec.name, "its QEMU ended");
        self.core.ended(now, vm, id);
        self.node.copies.remove(id);
        self.node.corpus.forget_memory(id);
        cutover::gone(&self.node, id);
        wires::runs_no_more(&self.node, &copy).await;
    }

    /// Performs all commands, in order; consecutive writes go to the disk together.
    async fn perform(&mut self) -> Result<(), DriverError> {
        let mut writes: Vec<(Key, Option<Value>)> = Vec::new();
        while let Some(command) = self.core.poll_command() {
            if let Command::Persist(key, value) = command {
                writes.push((key, value));
                continue;
            }
            self.flush(&mut writes).await?;
            self.command(command).await;
        }
        self.flush(&mut writes).await
    }

    async fn flush(&mut self, writes: &mut Vec<(Key, Option<Value>)>) -> Result<(), DriverError> {
        if writes.is_empty() {
            return Ok(());
        }
        let bound = writes.iter().any(
            |(_, v)| matches!(v, Some(Value::Moving(m)) if !m.started && m.role == godwit_protocol::migrate::Role::Destination),
        );
        let node = &self.node;
        let encoded: Vec<(Vec<u8>, Option<Vec<u8>>)> = writes
            .drain(..)
            .map(|(key, value)| Ok((key_bytes(key), value.map(|v| encode(node, v)).transpose()?)))
            .collect::<Result<_, codec::CodecError>>()
            .map_err(DriverError::of)?;
        let hard = Arc::clone(&self.node.hard);
        let written = tokio::task::spawn_blocking(move || {
            let changes: Vec<_> =
                encoded.iter().map(|(k, v)| (k.as_slice(), v.as_deref())).collect();
            hard.put_many(&changes)
        });
        // A failed write may be on the disk or not: nothing more may be said by this process.
        written.await.map_err(DriverError::of)?.map_err(DriverError::of)?;
        if bound {
            hold::at("loaded").await;
        }
        Ok(())
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::Persist(..) => {}
            Command::Send(to, message) => {
                if let Some(delay) = late_accept(&message) {
                    return send_late(&self.node, to, message, delay);
                }
                if says_ready(&message) {
                    hold::at("ballot").await;
                }
                // Lost messages are sent again by whoever waits for the answer.
                if let Err(error) = self.node.net.send(to, message) {
                    tracing::debug!(%to, %error, "not sent");
                }
            }
            Command::Effect { id, vm, effect } => self.effect(id, vm, effect).await,
            Command::Decided(record) => {
                self.node.decided.notify_waiters();
                nics::heard(&self.node, &record);
                tracing::info!(vm = %record.name, epoch = %record.epoch, cause = ?record.cause, "decided");
            }
            Command::Boot(vm, copy) => on::boot(&self.node, vm, copy),
            Command::Removed(_, copy) => off::forget(&self.node, copy),
            Command::Undecided(vm, epoch) => {
                tracing::warn!(%vm, %epoch, "not decided in time: unknown");
            }
            Command::Status(status) => {
                self.node.note_phase(&status);
                self.node.dialled.follow(&self.node, &status);
                if status.phase.is_end() {
                    // Its worker ends when it has done what it was told.
                    self.workers.remove(&status.id);
                }
                // Nobody may be listening.
                let _ = self.node.statuses.send(*status);
            }
            Command::Route(route) => wires::route_changed(&self.node, &route).await,
            Command::Member(host, up) => {
                tracing::info!(%host, up, "membership");
            }
        }
    }

    async fn effect(&mut self, id: MigrationId, vm: godwit_protocol::id::VmId, effect: Effect) {
        let node = &self.node;
        // From now on: the next move of this VM may begin before the worker comes to it.
        let rests = matches!(effect, Effect::Rest(_)).then(|| node.resting.begin(vm));
        let worker = self.workers.entry(id).or_insert_with(|| Worker::spawn(node, id, vm));
        // The queue is longer than any migration's effects; the worker never waits for the engine
        // with a full queue of its own.
        if worker.try_send((effect, rests)).is_err() {
            tracing::error!(%id, "a migration's worker is stuck: effect dropped");
        }
    }
}

/// The lab's delay, if this is what it asks to delay.
fn late_accept(message: &Control) -> Option<Duration> {
    let Control::Epoch(epoch) = message else { return None };
    let accept = matches!(epoch.body, godwit_protocol::wire::epoch::Body::Accept { .. });
    if accept { hold::late("late-accept") } else { None }
}

/// The lead, or a source, is told that a majority of the voters has promised.
fn says_ready(message: &Control) -> bool {
    matches!(message, Control::Migrate(said) if matches!(said.body, Body::BallotReady))
}

/// Sends a message after the delay, and then once more: to a protocol that must bear it.
fn send_late(node: &Arc<Node>, to: HostId, message: Control, delay: Duration) {
    let node = Arc::clone(node);
    tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        for _ in 0..2 {
            if node.net.send(to, message.clone()).is_ok() {
                hold::note("late-accept");
            }
        }
    });
}

fn key_bytes(key: Key) -> Vec<u8> {
    match key {
        Key::Epoch(vm) => [b"epoch/".as_slice(), &vm.0].concat(),
        Key::Moving(id) => [b"moving/".as_slice(), &id.0].concat(),
        Key::Status(id) => [b"status/".as_slice(), &id.0].concat(),
    }
}

fn encode(node: &Node, value: Value) -> Result<Vec<u8>, codec::CodecError> {
    match value {
        Value::Epoch(hard) => codec::encode(&*hard, STORED_BYTES),
        Value::Moving(moving) => codec::encode(&moving, STORED_BYTES),
        Value::Status(status) => {
            node.note_phase(&status);
            codec::encode(&node.with_timeline(*status, true), STORED_BYTES)
        }
    }
}

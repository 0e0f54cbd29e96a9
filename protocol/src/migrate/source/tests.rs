//! The source's steps, one at a time.

use super::*;
use crate::id::{Epoch, MigrationId, StoreId, VmId};
use crate::wire::record::{Cause, Placement, Voter};

const VM: VmId = VmId([7; 16]);
const COPY: CopyId = CopyId([1; 16]);

fn host(i: u8) -> HostId {
    HostId([i; 32])
}

fn begun(out: &mut Vec<Action>) -> Source {
    let record = Record {
        cluster: VM,
        name: "web".parse().unwrap(),
        epoch: Epoch(1),
        voters: vec![Voter { host: host(1), store: StoreId([1; 16]) }],
        placement: vec![Placement {
            vm: VM,
            name: "web".parse().unwrap(),
            host: host(1),
            copy: COPY,
            off: false,
            nics: Vec::new(),
        }],
        departed: Vec::new(),
        cause: Cause::Create,
    };
    let (id, name) = (MigrationId([3; 16]), record.name.clone());
    let status = Status::new(id, VM, name, host(1), host(3), &record);
    let begin = Begin {
        status,
        record,
        copy: COPY,
        spec: Vec::new(),
        options: Options::default(),
        candidates: vec![host(2)],
    };
    Source::begin(Time(0), begin, out)
}

fn said(source: &mut Source, body: Body) -> Vec<Action> {
    let mut out = Vec::new();
    source.handle(Time(1), Happened::Said(host(2), body), &mut out);
    out
}

#[test]
fn a_destination_that_comes_back_without_the_move_is_asked_again_a_few_times() {
    let mut out = Vec::new();
    let mut source = begun(&mut out);
    source.handle(Time(1), Happened::Connected(host(2)), &mut out);
    let asked = Action::Send(host(2), Body::Where);
    assert!(!out.contains(&asked), "what was not answered yet is not asked about");
    said(&mut source, Body::Ready);
    out.clear();
    source.handle(Time(2), Happened::Connected(host(3)), &mut out);
    assert_eq!(out, []);
    source.handle(Time(2), Happened::Connected(host(2)), &mut out);
    assert_eq!(out, [asked]);
    for _ in 0..wait::AGAIN {
        let out = said(&mut source, Body::Unknown);
        assert!(out.contains(&Action::Effect(Effect::CancelTransfer)), "{out:?}");
        let prepare =
            |a: &Action| matches!(a, Action::Send(h, Body::Prepare { .. }) if *h == host(2));
        assert!(out.iter().any(prepare), "{out:?}");
        said(&mut source, Body::Ready);
    }
    let out = said(&mut source, Body::Unknown);
    assert!(out.contains(&Action::Effect(Effect::CancelTransfer)), "{out:?}");
    assert!(source.is_over() && source.status().phase == Phase::Stayed);
}

#[test]
fn a_stopped_source_decides_before_it_runs_again() {
    let mut source = begun(&mut Vec::new());
    said(&mut source, Body::Ready);
    source.stop(Time(1), &mut Vec::new());
    let out = said(&mut source, Body::Unknown);
    assert!(matches!(out.as_slice(), [Action::Resolve(_)]), "{out:?}");
    assert!(!source.is_over());
}

#[test]
fn a_destination_that_is_silent_after_the_decision_ends_the_move_until_it_speaks() {
    let mut source = begun(&mut Vec::new());
    said(&mut source, Body::Ready);
    source.stop(Time(1), &mut Vec::new());
    let placed =
        Placement { host: host(2), copy: CopyId([2; 16]), ..source.record.placement[0].clone() };
    let record = Record { epoch: Epoch(2), placement: vec![placed], ..source.record.clone() };
    source.handle(Time(1), Happened::Decided(record), &mut Vec::new());
    let shown = |source: &mut Source, at: Time| {
        let mut out = Vec::new();
        source.handle(at, Happened::Timer, &mut out);
        let kept = !out.iter().any(|a| matches!(a, Action::Forget | Action::Effect(_)));
        assert!(kept && out.contains(&Action::Send(host(2), Body::Where)), "{out:?}");
        source.status().phase
    };
    let waits = Time(1).plus_ms(wait::RUNNING_MS - 1);
    assert_eq!(shown(&mut source, waits), Phase::Starting);
    assert_eq!(shown(&mut source, waits.plus_ms(wait::ASK_MS)), Phase::Lost);
    assert!(source.timeout().is_some());
    let out = said(&mut source, Body::Running { copy: CopyId([2; 16]), resumed_us: 1 });
    assert!(out.contains(&Action::Effect(Effect::Discard(COPY))), "{out:?}");
    assert!(source.is_over() && source.status().phase == Phase::Moved);
}

#[test]
fn a_move_goes_on_from_a_record_that_connects_nics_otherwise_once_both_ends_are() {
    let mut source = begun(&mut Vec::new());
    said(&mut source, Body::Ready);
    let next = |epoch, cause| Record { epoch: Epoch(epoch), cause, ..source.record.clone() };
    let (wires, voters) = (next(2, Cause::Wires(VM)), next(3, Cause::Voters));
    let converged = Progress {
        passes: 2,
        link_bytes_per_s: 1 << 30,
        rtt_ms: 1,
        disks_ready: true,
        ..Progress::default()
    };
    let handle = |source: &mut Source, happened| {
        let mut out = Vec::new();
        source.handle(Time(1), happened, &mut out);
        out
    };
    let asks =
        |out: &[Action]| out.iter().any(|a| matches!(a, Action::Send(_, Body::PrepareBallot(_))));
    let rebase = Action::Send(host(2), Body::Rebase(Box::new(wires.clone())));
    let out = handle(&mut source, Happened::Decided(wires));
    assert!(out.contains(&Action::Effect(Effect::Rewire(Epoch(2), Vec::new()))), "{out:?}");
    assert!(out.contains(&rebase) && source.status().epoch_before == Epoch(2), "{out:?}");
    let mut out = handle(&mut source, Happened::Progress(converged));
    assert!(!out.contains(&rebase) && !asks(&out), "told twice, or stopped: {out:?}");
    source.handle(Time(1).plus_ms(500), Happened::Progress(converged), &mut out);
    assert!(out.contains(&rebase) && !asks(&out), "not told again, or stopped: {out:?}");
    handle(&mut source, Happened::Rewired(Epoch(2)));
    said(&mut source, Body::Rebased(Epoch(1)));
    assert!(!asks(&handle(&mut source, Happened::Progress(converged))), "of another record");
    said(&mut source, Body::Rebased(Epoch(2)));
    assert!(asks(&handle(&mut source, Happened::Progress(converged))));
    // Any other change ends it.
    handle(&mut source, Happened::Decided(voters));
    assert!(source.is_over() && source.status().phase == Phase::Stayed);
}

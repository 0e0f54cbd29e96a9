//! Faults while disks move: the matrix of `scenario::faults` in the phases that only disks have, under acknowledged writes.
//!
//! Owns which cases there are and the report. Invariant: what a guest acknowledged is counted after every case by the
//! checker outside, and once more after redis was killed.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::acked::{Acked, Kept};
use super::super::faults::case::{Case, Fault, Phase};
use super::super::faults::world::World;
use super::roundtrips::{acknowledge, debian, off_and_clean};
use super::{move_compared, refused, verified};
use crate::guest::disk::DiskForm;
use crate::lab::qemus::double_runs;
use crate::lab::wan::LinkParams;

/// Id of the lab.
const LAB: &str = "dfaults";

fn matrix() -> Vec<Case> {
    let faults = [
        Fault::WanCut,
        Fault::RequestingNode,
        Fault::SourceNode,
        Fault::DestinationNode,
        Fault::DestinationQemu,
    ];
    let of = |phase| faults.map(|fault| Case::new(fault, phase));
    [Phase::Disk, Phase::Mirrored, Phase::Stopped, Phase::Decided]
        .into_iter()
        .flat_map(of)
        .collect()
}

/// What a stage showed at its end.
struct Last {
    /// What the guest acknowledged and has not, after redis was killed.
    kept: Kept,
    /// The disks were the same at both ends of its last move.
    equal: bool,
    /// `e2fsck` finds nothing on the guest's file system after its power-off.
    clean: bool,
    double_runs: u64,
}

/// A world, and the writes that its guest acknowledges.
struct Stage {
    world: World,
    writer: Acked,
}

impl Stage {
    fn up() -> Result<Self> {
        let mut world = World::up(LAB, debian(DiskForm::Raw, LinkParams::new(100, 80)))?;
        let writer = acknowledge(&mut world)?;
        // Both sites know the disks then, as they do in whatever comes between the first move and the last.
        ensure!(move_compared(&mut world)?.equal, "the images differ");
        Ok(Self { world, writer })
    }

    /// Ends it, after one move whose images are compared.
    fn down(mut self) -> Result<Last> {
        let equal = move_compared(&mut self.world)?.equal;
        let (guest, _) = self.world.guest()?;
        let (kept, _) = self.writer.finish(&mut self.world.control(&guest.name)?)?;
        verified(&self.world, &guest.name)?;
        let clean = off_and_clean(&mut self.world)?;
        let double_runs = double_runs(&self.world.qemus.seen()).len() as u64;
        self.world.down()?;
        Ok(Last { kept, equal, clean, double_runs })
    }
}

/// `godwit-lab run disk-faults`. With `GODWIT_LAB_CASE` only the cases whose name contains it.
pub fn run_all() -> Result<Value> {
    let wanted = std::env::var("GODWIT_LAB_CASE").unwrap_or_default();
    let mut skipped = vec![json!({
        "case": "kill destination QEMU / running",
        "cause": "the guest's memory goes with its QEMU, as when a host dies: shown in `run faults`",
    })];
    let mut book = Book::default();
    let mut stage: Option<Stage> = None;
    for case in matrix() {
        let run = |stage: &mut Stage| case.run(&mut stage.world);
        book.one(&mut stage, &wanted, &mut skipped, &case.name(), run)?;
    }
    for (name, work) in refused::CASES {
        let run = |stage: &mut Stage| {
            work(&mut stage.world).map(|figures| json!({"passed": true, "figures": figures}))
        };
        book.one(&mut stage, &wanted, &mut skipped, name, run)?;
    }
    if let Some(stage) = stage {
        book.close(stage.down()?);
    }
    Ok(book.report(skipped))
}

/// What was seen so far.
#[derive(Default)]
struct Book {
    cases: Vec<Value>,
    acked: u64,
    acked_lost: u64,
    double_runs: u64,
    /// Stages whose disks differed at their end, or whose file system was damaged.
    spoiled: u64,
}

impl Book {
    /// Runs one case, if it is wanted; after a failure the next one has a new swarm.
    fn one(
        &mut self,
        stage: &mut Option<Stage>,
        wanted: &str,
        skipped: &mut Vec<Value>,
        name: &str,
        run: impl FnOnce(&mut Stage) -> Result<Value>,
    ) -> Result<()> {
        if !name.contains(wanted) {
            skipped.push(json!({"case": name, "cause": "not asked for"}));
            return Ok(());
        }
        println!("==> {name}");
        let ready = match stage.take() {
            Some(ready) => ready,
            None => Stage::up()?,
        };
        let ready = stage.insert(ready);
        let done = run(ready).and_then(|mut report| {
            let kept = ready.writer.check()?;
            report["acked"] = kept.acked.into();
            report["acked_lost"] = kept.lost.into();
            report["passed"] = (report["passed"] == true && kept.lost == 0).into();
            Ok(report)
        });
        let mut report = done
            .unwrap_or_else(|error| json!({"passed": false, "failures": [format!("{error:#}")]}));
        report["case"] = name.into();
        println!("    {report}");
        if let Some(stage) = &stage {
            stage.world.keep_logs(name);
        }
        if report["passed"] != true
            && let Some(stage) = stage.take()
        {
            match stage.down().context("after a failure") {
                Ok(seen) => self.close(seen),
                // Its guest may be gone; what was lost until then is in the case.
                Err(error) => println!("    {error:#}"),
            }
        }
        self.acked_lost = self.acked_lost.max(report["acked_lost"].as_u64().unwrap_or(0));
        self.cases.push(report);
        Ok(())
    }

    fn close(&mut self, last: Last) {
        self.acked += last.kept.acked;
        self.acked_lost = self.acked_lost.max(last.kept.lost);
        self.double_runs += last.double_runs;
        self.spoiled += u64::from(!last.equal || !last.clean);
    }

    fn report(self, skipped: Vec<Value>) -> Value {
        let passed = !self.cases.is_empty() && self.cases.iter().all(|r| r["passed"] == true);
        let seen = |key: &str| self.cases.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
        let double = seen("double_runs").max(self.double_runs);
        json!({
            "scenario": "disk-faults",
            "passed": passed && double == 0 && self.acked_lost == 0 && self.spoiled == 0,
            "disk_equal_and_clean": self.spoiled == 0,
            "runs": self.cases.len(),
            "double_runs": double,
            "acked": self.acked,
            "acked_lost": self.acked_lost,
            "corrupt_pages": seen("pages_corrupt"),
            "lost": self.cases.iter().filter(|r| r["outcome"] == "lost").count(),
            "skipped": skipped,
            "cases": self.cases,
        })
    }
}

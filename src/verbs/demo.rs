//! `demo`: shows on a scratch volume what holdstill is for. A program writes to the volume all the
//! while; it is imaged, restored and verified, and beside that copied as `dd` would.

mod ledger;
mod scene;

use serde::Serialize;

use self::ledger::Ledger;
pub use self::ledger::Verdict;
use self::scene::Scene;
use crate::error::Result;
use crate::freeze::CowRoom;
use crate::freeze::session::Hooks;
use crate::image::manifest::Grade;
use crate::pipeline::Bounds;
use crate::pipeline::read::OnReadError;
use crate::pipeline::store::{Compression, DEFAULT_LEVEL};
use crate::progress::{Event, Progress};
use crate::verbs::{backup, restore, verify};

/// What was shown.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How the volume was made to hold still.
    pub freeze: String,
    /// The image's grade.
    pub grade: Grade,
    /// All the time the writer was blocked, in milliseconds.
    pub freeze_ms: f64,
    /// Writes that the program did while the image was made.
    pub writes_meanwhile: u64,
    /// Bytes of the volume in use.
    pub used_bytes: u64,
    /// Bytes of the image.
    pub stored_bytes: u64,
    /// What the restored image is worth.
    pub restored: Verdict,
    /// What the plain copy is worth.
    pub plain_copy: Verdict,
}

/// Runs the demonstration. It needs root: the scratch volume is mounted.
///
/// # Errors
/// If the volume cannot be made, or any step fails.
pub fn run(run_id: &str, progress: &dyn Progress) -> Result<Report> {
    let say = |text: &str| progress.event(&Event::Plan(text));
    let scene = Scene::set_up(run_id)?;
    say(&format!(
        "a scratch ext4 volume on {}; a program writes to it all the while",
        scene.device()
    ));
    let ledger = Ledger::start(&scene.live().join("ledger"))?;
    progress.check()?;

    say("copied as dd would, while the program writes");
    let plain = scene.plain_copy()?;
    progress.check()?;

    say("imaged with holdstill, while the program writes");
    let before = ledger.written();
    let image = scene.path("image.still");
    let options = backup::Options {
        sources: vec![scene.live().display().to_string()],
        recursive: false,
        output: Some(image.clone()),
        freeze: None,
        cow: CowRoom::default(),
        compression: Compression::Zstd(DEFAULT_LEVEL),
        no_freeze: false,
        all_blocks: false,
        on_read_error: OnReadError::Fail,
        force: false,
        bounds: Bounds::default(),
        hooks: Hooks::default(),
        run_id: run_id.to_owned(),
    };
    let report = backup::run(&options, progress)?;
    let writes_meanwhile = ledger.written() - before;
    ledger.stop()?;

    say("verified and restored");
    let verify_options = verify::Options {
        image: image.clone(),
        against: None,
        volume: 0,
        expect_id: None,
        bounds: options.bounds,
    };
    verify::run(&verify_options, progress)?;
    let restored = scene.path("restored.raw");
    let restore_options = restore::Options {
        image,
        targets: vec![(0, restored.clone())],
        discard: false,
        verify: true,
        allow_unusable: false,
        allow_twin: false,
        new_ids: false,
        salvage: false,
        expect_id: None,
        bounds: options.bounds,
    };
    restore::run(&restore_options, &mut |_| Ok(()), progress)?;
    Ok(Report {
        freeze: report.freeze,
        grade: report.grade,
        freeze_ms: report.freeze_ms,
        writes_meanwhile,
        used_bytes: report.used_bytes,
        stored_bytes: report.stored_bytes,
        restored: scene.judge(&restored)?,
        plain_copy: scene.judge(&plain)?,
    })
}

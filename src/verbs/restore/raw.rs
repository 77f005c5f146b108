//! `restore IMAGE -`: a volume as raw bytes on standard output, what nobody knows of it as zeros.
//!
//! What is written to a stream cannot be taken back. So the image is checked from end to end first, and is then
//! read by its index, which checks every block once more.

use std::path::Path;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::output::Output;

use super::{Options, Part, Report, TargetReport, choose};
use crate::error::{Error, Kind, Result};
use crate::image::index::IndexedImage;
use crate::image::manifest::{Manifest, VolumeManifest};
use crate::image::writer::Sink;
use crate::progress::{Event, Progress};
use crate::storage::input;
use crate::storage::output::OutputSink;
use crate::units::{ByteLen, Offset};
use crate::verbs::verify;

/// Bytes read and written at once.
const PIECE: u64 = 1 << 20;

/// Whether `target` stands for standard output.
pub(crate) fn is_stdout(target: &Path) -> bool {
    target.as_os_str() == "-"
}

impl Options {
    /// Whether the volume goes to standard output.
    pub fn is_to_stdout(&self) -> bool {
        self.targets.iter().any(|(_, target)| is_stdout(target))
    }
}

/// Refuses what makes no sense where a volume goes to standard output.
///
/// # Errors
/// [`Kind::Usage`].
pub(super) fn check_usage(options: &Options) -> Result<()> {
    let usage = |what: &str| Err(Error::new(Kind::Usage, what));
    if !options.is_to_stdout() {
        return Ok(());
    }
    if options.targets.len() > 1 {
        return usage("standard output takes one volume, and no other target beside it");
    }
    if input::is_stream(&options.image) {
        return usage("to write to standard output, the image has to be in a file");
    }
    for (is_set, name) in [
        (options.verify, "verify"),
        (options.discard, "discard"),
        (options.salvage, "salvage"),
        (options.new_ids, "new-ids"),
        (options.allow_twin, "allow-twin"),
        (options.allow_unusable, "allow-unusable"),
    ] {
        if is_set {
            return usage(&format!(
                "--{name} is for targets, and standard output is not one"
            ));
        }
    }
    Ok(())
}

/// The volume that goes to standard output.
///
/// # Errors
/// [`Kind::NotApplicable`] for what is not complete as it is in the image; if it has to be chosen first.
pub(super) fn volume(options: &Options, manifest: &Manifest) -> Result<VolumeManifest> {
    let chosen = choose(manifest, &options.targets)?;
    match chosen.as_slice() {
        [(Part::Volume(volume), _)] if volume.subvolume.is_none() => Ok((*volume).clone()),
        [(Part::Volume(_), _)] => Err(Error::new(
            Kind::NotApplicable,
            "only a part of its filesystem is in the image, which a device or file is needed for",
        )),
        _ => Err(Error::new(
            Kind::NotApplicable,
            "only a volume can be written to standard output, and this is a stream",
        )),
    }
}

/// Writes it.
///
/// # Errors
/// Whatever went wrong. Nothing was written yet if the image is damaged.
pub(super) fn run(
    options: &Options,
    manifest: &Manifest,
    progress: &dyn Progress,
) -> Result<Report> {
    let begun = std::time::Instant::now();
    let volume = volume(options, manifest)?;
    progress.event(&Event::Plan(&format!(
        "volume {} to standard output, once the image is checked",
        volume.n
    )));
    let checked = verify::run(
        &verify::Options {
            image: options.image.clone(),
            against: None,
            volume: 0,
            expect_id: options.expect_id,
            bounds: options.bounds,
        },
        progress,
    )?;
    let name = || input::name(&options.image);
    let disk = Disk::open(&options.image, Access::Read)?;
    let (image, _) = IndexedImage::open(&disk).map_err(|error| error.on(name()))?;
    let mut sink = OutputSink::new(Output::stdout()?, progress)?;
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    progress.total(manifest.used_bytes() + ByteLen(volume.size));
    while at < volume.size {
        let piece = &mut buffer[..(volume.size - at).min(PIECE) as usize];
        image
            .read(volume.n, Offset(at), piece)
            .map_err(|error| error.on(name()))?;
        sink.append(piece)?;
        at += piece.len() as u64;
        progress.advance(ByteLen(piece.len() as u64));
        progress.check()?;
    }
    sink.into_output()?.publish()?;
    Ok(Report {
        image: checked.image,
        image_id: checked.image_id,
        content_id: checked.content_id,
        grade: checked.grade,
        targets: vec![TargetReport {
            n: volume.n,
            path: "-".to_owned(),
            new_uuid: None,
            subvolume: None,
        }],
        verified: false,
        elapsed_s: begun.elapsed().as_secs_f64(),
        warnings: checked.warnings,
    })
}

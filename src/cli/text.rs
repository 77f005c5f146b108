//! Results as a person reads them.

use std::fmt::Write;

use crate::error::Escaped;
use crate::image::manifest::{CommitProof, Grade};
use crate::units::ByteLen;
use crate::verbs::backup;
use crate::verbs::cleanup;
use crate::verbs::clone;
use crate::verbs::demo::{self, Verdict};
use crate::verbs::dry_run;
use crate::verbs::inspect;
use crate::verbs::restore;
use crate::verbs::verify;

pub(super) fn backup(report: &backup::Report) -> String {
    let mut text = String::new();
    let used = ByteLen(report.used_bytes);
    let stored = ByteLen(report.stored_bytes);
    let _ = writeln!(
        text,
        "{}: {used} in {stored}, {}",
        Escaped(&report.image),
        grade(report.grade)
    );
    let _ = writeln!(
        text,
        "instant {}, writers blocked for {:.0} ms, done in {:.1} s",
        report.instant, report.freeze_ms, report.elapsed_s
    );
    for volume in &report.volumes {
        for (offset, len) in &volume.unreadable {
            let _ = writeln!(
                text,
                "volume {}: {len} bytes at {offset} could not be read and are zeros",
                volume.n
            );
        }
    }
    for stream in &report.streams {
        let _ = writeln!(
            text,
            "stream {}: {} of {}, {}",
            stream.n,
            Escaped(&stream.kind),
            Escaped(&stream.path),
            ByteLen(stream.len)
        );
    }
    let _ = write!(text, "image id {}", report.image_id);
    if let Some(content_id) = &report.content_id {
        let _ = write!(text, "\ncontent id {content_id}");
    }
    text
}

pub(super) fn restore(report: &restore::Report) -> String {
    let mut text = String::new();
    for target in &report.targets {
        let _ = write!(
            text,
            "volume {} is restored to {}",
            target.n,
            Escaped(&target.path)
        );
        if let Some(subvolume) = &target.subvolume {
            let _ = write!(text, ", only its subvolume {}", Escaped(&subvolume.path));
        }
        text.push_str(&new_uuid(target.new_uuid.as_deref()));
        text.push('\n');
    }
    let read_back = if report.verified {
        ", read back and compared"
    } else {
        ""
    };
    let _ = write!(
        text,
        "{}{read_back}, done in {:.1} s",
        grade(report.grade),
        report.elapsed_s
    );
    text
}

pub(super) fn clone(report: &clone::Report) -> String {
    let mut text = format!(
        "{} is cloned to {}{}{}: {}, {}",
        Escaped(&report.source),
        Escaped(&report.target),
        new_uuid(report.new_uuid.as_deref()),
        if report.verified {
            " and read back"
        } else {
            ""
        },
        ByteLen(report.used_bytes),
        grade(report.grade)
    );
    let _ = write!(
        text,
        "\ninstant {}, writers blocked for {:.0} ms, done in {:.1} s",
        report.instant, report.freeze_ms, report.elapsed_s
    );
    for (offset, len) in &report.unreadable {
        let _ = write!(
            text,
            "\n{len} bytes at {offset} could not be read and are zeros"
        );
    }
    text
}

pub(super) fn verify(report: &verify::Report) -> String {
    let mut text = format!("{}: every byte is whole", Escaped(&report.image));
    if let Some(against) = &report.against {
        let _ = write!(text, ", and equal to {}", Escaped(against));
    }
    let _ = write!(
        text,
        "; {}, done in {:.1} s\nimage id {}",
        grade(report.grade),
        report.elapsed_s,
        report.image_id
    );
    if let Some(content_id) = &report.content_id {
        let _ = write!(text, "\ncontent id {content_id}");
    }
    text
}

/// What proves that a commit of a filesystem in use is all there.
fn commit_proof(commit: &CommitProof) -> String {
    let mut text = format!(
        "\ncommit {} of {}: {} subvolumes, {} pinned, window of {:.0} ms with {} of trees and {} of data; \
         of the rest {} have right checksums and {} have none",
        commit.generation,
        Escaped(&commit.fsid),
        commit.subvolumes,
        commit.pinned,
        commit.window_ms,
        ByteLen(commit.window_tree_bytes),
        ByteLen(commit.window_data_bytes),
        ByteLen(commit.checked_bytes),
        ByteLen(commit.unchecked_bytes),
    );
    if commit.mended_sectors > 0 {
        let _ = write!(text, "; {} sectors were mended", commit.mended_sectors);
    }
    if commit.gone_sectors > 0 {
        let _ = write!(
            text,
            "; {} sectors of what was being deleted are left out",
            commit.gone_sectors
        );
    }
    text
}

pub(super) fn dry_run(report: &dry_run::Report) -> String {
    let mut lines = Vec::new();
    for action in &report.actions {
        let mut line = format!(
            "would copy {} to {}",
            Escaped(&action.source),
            Escaped(&action.target)
        );
        if let Some(step) = &action.step {
            let _ = write!(line, ", step `{step}`");
        }
        if let Some(used) = action.used_bytes {
            let _ = write!(line, ", about {}", ByteLen(used));
        }
        if let Some(free) = action.free_bytes {
            let _ = write!(line, " ({} are free there)", ByteLen(free));
        }
        if action.overwrites {
            line.push_str(", overwriting what is there");
        }
        if let Some(now) = &action.now {
            let _ = write!(line, " ({now})");
        }
        if action.new_ids {
            line.push_str(", with a new UUID");
        }
        for step in &action.passed_over {
            let why = step.objection.as_deref().unwrap_or_default();
            let _ = write!(line, "\n  not `{}`: {}", step.step, Escaped(why));
        }
        lines.push(line);
    }
    lines.join("\n")
}

pub(super) fn cleanup(report: &cleanup::Report) -> String {
    let mut lines = Vec::new();
    for action in &report.actions {
        let done = match (action.action, report.dry_run) {
            ("thawed", true) => "would thaw",
            (_, true) => "would remove",
            (done, false) => done,
        };
        let mut line = format!("{done} {} {}", action.kind, Escaped(&action.name));
        if let Some(run_id) = &action.run_id {
            let _ = write!(line, ", of run {}", Escaped(run_id));
        }
        if let Some(begun) = &action.begun {
            let _ = write!(line, ", begun {}", Escaped(begun));
        }
        lines.push(line);
    }
    if !report.live_runs.is_empty() {
        lines.push(format!(
            "{} runs are alive and were left alone",
            report.live_runs.len()
        ));
    }
    match report.dead_runs.len() {
        0 if lines.is_empty() => lines.push("nothing to clean up".to_owned()),
        0 => {}
        count if report.dry_run => lines.push(format!("{count} dead runs would be cleaned up")),
        count => lines.push(format!("{count} dead runs are cleaned up")),
    }
    lines.join("\n")
}

pub(super) fn demo(report: &demo::Report) -> String {
    format!(
        "\na plain copy:  {}\nholdstill:     {}\n\nThe program did {} writes while the image was made, \
         and was blocked for {:.0} ms.\n{} in use are {} in the image; it was verified, restored, and \
         read back.",
        verdict(&report.plain_copy),
        verdict(&report.restored),
        report.writes_meanwhile,
        report.freeze_ms,
        ByteLen(report.used_bytes),
        ByteLen(report.stored_bytes),
    )
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::OneInstant { writes } => {
            format!("one instant: exactly writes 1 to {writes}, none missing")
        }
        Verdict::Torn { last, missing } => {
            format!("TORN: it has write {last}, but {missing} writes before it are missing")
        }
        Verdict::Unreadable { why } => format!("UNREADABLE: {}", Escaped(why)),
    }
}

pub(super) fn inspect(report: &inspect::Report) -> String {
    match report {
        inspect::Report::Image(image) => inspect_image(image),
        inspect::Report::Source(source) => inspect_source(source),
        inspect::Report::Dataset(dataset) => format!(
            "{}: a dataset of ZFS\nbackup would take its stream, by {}",
            Escaped(&dataset.path),
            dataset.step
        ),
    }
}

fn inspect_image(report: &inspect::ImageReport) -> String {
    let mut text = format!(
        "{}: holdstill image of {}, {}",
        Escaped(&report.image),
        ByteLen(report.stored_bytes),
        grade(report.trailer.grade)
    );
    let _ = write!(
        text,
        "\nmade {} by {}, step {}, instant {}, writers blocked for {:.0} ms",
        Escaped(&report.manifest.created),
        Escaped(&report.manifest.tool),
        Escaped(&report.trailer.freeze),
        Escaped(&report.trailer.instant),
        report.trailer.freeze_ms,
    );
    if let Some(host) = &report.manifest.host {
        let _ = write!(text, "\non host {}", Escaped(host));
    }
    if let Some(id) = &report.manifest.machine_id {
        let _ = write!(text, "\nmachine id {}", Escaped(id));
    }
    let _ = write!(text, "\nimage id {}", report.image_id);
    if let Some(content_id) = &report.trailer.content_id {
        let _ = write!(text, "\ncontent id {}", Escaped(content_id));
    }
    for (volume, achieved) in report.manifest.volumes.iter().zip(&report.trailer.volumes) {
        let _ = write!(
            text,
            "\nvolume {}: {} {}, size {}, used {}, {}",
            volume.n,
            Escaped(&volume.path),
            identity(
                volume.fs.as_deref(),
                volume.label.as_deref(),
                volume.uuid.as_deref()
            ),
            ByteLen(volume.size),
            ByteLen(achieved.used_bytes),
            achieved.grade.name(),
        );
        if let Some(point) = &volume.mount_point {
            let _ = write!(text, ", mounted at {}", Escaped(point));
        }
        if let Some(subvolume) = &volume.subvolume {
            let _ = write!(text, ", only subvolume {}", Escaped(&subvolume.path));
        }
        if !achieved.unreadable.is_empty() {
            let _ = write!(text, ", {} unreadable ranges", achieved.unreadable.len());
        }
    }
    for stream in &report.manifest.streams {
        let _ = write!(
            text,
            "\nstream {}: {} of {}",
            stream.n,
            Escaped(&stream.kind),
            Escaped(&stream.path)
        );
    }
    for commit in &report.trailer.commits {
        text.push_str(&commit_proof(commit));
    }
    for warning in &report.trailer.warnings {
        let _ = write!(text, "\nwarning: {}", Escaped(warning));
    }
    text
}

fn inspect_source(report: &inspect::SourceReport) -> String {
    let mut text = format!(
        "{}: {}, size {}, {}",
        Escaped(&report.path),
        identity(
            report.fs.as_deref(),
            report.label.as_deref(),
            report.uuid.as_deref()
        ),
        ByteLen(report.size),
        report.condition,
    );
    if let Some(used) = report.used_bytes {
        let _ = write!(text, ", used {}", ByteLen(used));
    }
    if let Some(point) = &report.mounted_at {
        let _ = write!(text, "\nmounted at {}", Escaped(point));
    }
    for volume in &report.volumes {
        text.push_str(&inspect_volume(volume));
    }
    if !report.siblings.is_empty() {
        let _ = write!(
            text,
            "\nimaged together with {}",
            Escaped(&report.siblings.join(", "))
        );
    }
    for step in &report.ladder {
        match &step.objection {
            None => {
                let _ = write!(text, "\nbackup would use `{}`", step.step);
                break;
            }
            Some(why) => {
                let _ = write!(text, "\nnot `{}`: {}", step.step, Escaped(why));
            }
        }
    }
    if report.step.is_none() {
        text.push_str("\nbackup would refuse: nothing can make it hold still");
    }
    for warning in &report.warnings {
        let _ = write!(text, "\nwarning: {}", Escaped(warning));
    }
    text
}

fn inspect_volume(volume: &inspect::VolumeReport) -> String {
    let mut traits = volume.roles.clone();
    if volume.encrypted {
        traits.push("encrypted");
    }
    if volume.sealed {
        traits.push("sealed");
    }
    let traits = match traits.is_empty() {
        true => String::new(),
        false => format!(" ({})", traits.join(", ")),
    };
    let mut text = format!(
        "\nvolume `{}`{traits} {}, used {}",
        Escaped(&volume.name),
        volume.uuid,
        ByteLen(volume.used_bytes)
    );
    for snapshot in &volume.snapshots {
        let created = snapshot.created.as_deref().unwrap_or("an unknown time");
        let _ = write!(
            text,
            "\n  snapshot `{}` of {created}",
            Escaped(&snapshot.name)
        );
    }
    text
}

fn new_uuid(new: Option<&str>) -> String {
    new.map_or(String::new(), |new| format!(", with the new UUID {new}"))
}

fn identity(fs: Option<&str>, label: Option<&str>, uuid: Option<&str>) -> String {
    let mut text = fs.map_or("no known filesystem".to_owned(), |fs| {
        Escaped(fs).to_string()
    });
    if let Some(label) = label {
        let _ = write!(text, " `{}`", Escaped(label));
    }
    if let Some(uuid) = uuid {
        let _ = write!(text, " {}", Escaped(uuid));
    }
    text
}

fn grade(grade: Grade) -> &'static str {
    match grade {
        Grade::Frozen => "grade frozen: exactly one instant of a filesystem in use",
        Grade::Clean => "grade clean: offline and cleanly unmounted",
        Grade::Unknown => {
            "grade unknown: nobody wrote meanwhile; whether it was in order cannot be told"
        }
        Grade::Crash => "grade CRASH: one instant, as a power cut would have left it",
        Grade::Torn => "grade TORN: it may have changed while it was read",
    }
}

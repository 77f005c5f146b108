//! What can be typed. `--help` is made from the comments here.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::{Error, Kind, Result};
use crate::freeze::CowRoom;
use crate::freeze::session::Hooks;
use crate::freeze::step::{self, AnyStep, STEPS};
use crate::pipeline::Bounds;
use crate::pipeline::read::OnReadError;
use crate::pipeline::store::Compression;
use crate::storage::input::ExpectedId;
use crate::units::{ByteLen, ParseSizeError};
use crate::verbs::restore::raw;
use crate::verbs::{backup, clone, restore, verify};

const EXIT_CODES: &str = "Exit codes:
  0    done, and what was made is whole
  1    failed: I/O error, no space, no permission, missing source
  2    wrong usage, or a question would have to be answered
  3    refused for safety: in use, too small, unusable there, exists, or would be inconsistent
  4    an image is damaged, cut off, too new or not the expected one; or a comparison differs
  5    done, but some source blocks could not be read
  6    done, and what was made is whole, but the --post-freeze command failed
  130  interrupted; 143 asked to end: everything was thawed and cleaned up first";

/// Images a disk while you keep working: the disk holds still, not you.
#[derive(Debug, Parser)]
#[command(name = "holdstill", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Print one JSON object a line instead of text
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// How to show progress
    #[arg(long, global = true, value_enum, default_value_t = ProgressKind::Auto, value_name = "HOW")]
    pub(super) progress: ProgressKind,
    /// Print nothing but errors
    #[arg(long, global = true)]
    pub(super) quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProgressKind {
    /// A bar on a terminal, else a line now and then
    Auto,
    /// A bar
    Bar,
    /// A line now and then
    Plain,
    /// Nothing
    None,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Write the used blocks of one or more sources to an image
    Backup(BackupArgs),
    /// Write an image back to a device or raw file
    Restore(RestoreArgs),
    /// Copy the used blocks of a source straight to a device or raw file
    Clone(CloneArgs),
    /// Check every byte of an image
    Verify(VerifyArgs),
    /// Say what a source or an image is, and how it would be backed up
    Inspect(InspectArgs),
    /// Remove what killed runs left, and thaw what they left frozen
    Cleanup {
        /// Only what this run made to copy volumes of APFS: for its guard process
        #[arg(long, value_name = "ID", hide = true, conflicts_with = "dry_run")]
        run: Option<String>,
        /// Print what would be done, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Show on a scratch volume what this is for (needs root)
    Demo,
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write one for each verb to a folder
    Man {
        /// The folder
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
    },
}

impl Verb {
    /// The bound on how fast bytes move, if there is one.
    pub(super) fn rate(&self) -> Option<ByteLen> {
        match self {
            Self::Backup(args) => args.copying.rate,
            Self::Restore(args) => args.copying.rate,
            Self::Clone(args) => args.copying.rate,
            _ => None,
        }
    }

    /// Whether standard output is taken by an image or a volume.
    pub(super) fn streams_to_stdout(&self) -> bool {
        match self {
            Self::Backup(args) => args.output.as_os_str() == "-",
            Self::Restore(args) => {
                let is_target = args.target.as_deref().is_some_and(raw::is_stdout);
                is_target || args.map.iter().any(|text| text.ends_with("=-"))
            }
            _ => false,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// Block devices (also LABEL=, UUID=, PARTLABEL=, PARTUUID=), mount points, volumes of LVM or ZFS (VG/LV,
    /// POOL/NAME), datasets of ZFS, or files that hold a raw disk
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// The image to write; `-` streams it to standard output
    #[arg(short, long, value_name = "IMAGE")]
    output: PathBuf,
    /// Of datasets of ZFS, take all below, too, at one instant
    #[arg(short, long)]
    recursive: bool,
    #[command(flatten)]
    freeze: FreezeArgs,
    /// How to compress: zstd, zstd:LEVEL (-7 to 19, default 1) or none
    #[arg(long, value_name = "HOW", default_value = "zstd:1")]
    compress: String,
    /// Replace an existing image
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    copying: CopyArgs,
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// How a source is made to hold still and read: the same for every verb that copies one.
#[derive(Debug, Args)]
struct FreezeArgs {
    /// How the source is made to hold still
    #[arg(long, value_name = "STEP", default_value = "auto", value_parser = steps())]
    freeze: String,
    /// With --freeze none: copy a source that nothing holds still. The copy is torn, and says so
    #[arg(long)]
    allow_inconsistent: bool,
    /// Make nobody wait, not even for milliseconds: of a mounted btrfs, the copy is then as after a power
    /// cut; steps that freeze are refused
    #[arg(long)]
    no_freeze: bool,
    /// Room for the snapshot of a thick logical volume (default: half of what its volume group has
    /// free, and more when needed), or of --freeze dm (default: all that the source can need, or half
    /// of what is free in /var/tmp, or a quarter of free memory)
    #[arg(long, value_name = "SIZE", value_parser = above_zero)]
    cow_size: Option<ByteLen>,
    /// Make that snapshot on this physical volume of the group; with --freeze dm, keep what is
    /// overwritten on this free device, whose content is lost
    #[arg(long, value_name = "DEV")]
    cow_device: Option<PathBuf>,
    /// Run CMD by /bin/sh before the (final) freeze, to quiesce a database; if it fails or takes longer than
    /// 60 s, nothing is frozen. Its environment has HOLDSTILL_RUN_ID, HOLDSTILL_SOURCE (the sources as
    /// given, one a line) and HOLDSTILL_PHASE (pre or post); what it prints goes to standard error. Where
    /// snapshots come first and a freeze of other sources later, both commands run around each. With
    /// `track` and `btrfs`, a clone onto an existing target runs both commands once more, before it touches
    /// the target
    #[arg(long, value_name = "CMD")]
    pre_freeze: Option<String>,
    /// Run CMD right after the thaw; always, once the first was started, also if this run is killed. If it
    /// fails, the exit code is 6
    #[arg(long, value_name = "CMD")]
    post_freeze: Option<String>,
    /// Copy unallocated blocks too
    #[arg(long)]
    all_blocks: bool,
    /// What to do with blocks that cannot be read
    #[arg(long, value_enum, default_value_t = ReadError::Fail, value_name = "WHAT")]
    on_read_error: ReadError,
}

/// The names of all steps, each with its line of help.
fn steps() -> PossibleValuesParser {
    let auto = PossibleValue::new("auto").help("the first of these that applies");
    let of_each = STEPS.map(|step| PossibleValue::new(step.name()).help(step.about()));
    PossibleValuesParser::new(std::iter::once(auto).chain(of_each).collect::<Vec<_>>())
}

impl FreezeArgs {
    fn step(&self) -> Result<Option<AnyStep>> {
        let step = match self.freeze.as_str() {
            "auto" => None,
            name => Some(step::named(name)?),
        };
        match self.allow_inconsistent && step != Some(step::NONE) {
            true => Err(Error::new(
                Kind::Usage,
                "--allow-inconsistent is for --freeze none only",
            )),
            false => Ok(step),
        }
    }

    /// Refuses a torn copy that was not asked for: when all else that was typed makes sense.
    fn refuse_torn(&self) -> Result<()> {
        match self.step()? == Some(step::NONE) && !self.allow_inconsistent {
            true => Err(Error::new(
                Kind::Inconsistent,
                "with `--freeze none` a copy of a source in use is torn",
            )
            .hint("--allow-inconsistent makes it anyway")),
            false => Ok(()),
        }
    }

    fn cow(&self) -> Result<CowRoom> {
        let room = CowRoom {
            size: self.cow_size,
            device: self.cow_device.clone(),
        };
        let can_need_it = self
            .step()?
            .is_none_or(|step| step.keeps_what_is_overwritten());
        if room != CowRoom::default() && !can_need_it {
            return Err(Error::new(
                Kind::Usage,
                format!("--freeze {} makes no copy-on-write snapshot", self.freeze),
            )
            .hint("--cow-size and --cow-device are for --freeze lvm and dm"));
        }
        Ok(room)
    }

    fn hooks(&self) -> Hooks {
        Hooks {
            pre: self.pre_freeze.clone(),
            post: self.post_freeze.clone(),
            is_stderr_taken: false,
        }
    }

    fn on_read_error(&self) -> OnReadError {
        match self.on_read_error {
            ReadError::Fail => OnReadError::Fail,
            ReadError::Zero => OnReadError::Zero,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ReadError {
    /// Give up
    Fail,
    /// Retry block by block, store zeros for what stays unreadable, list it, and exit with 5
    Zero,
}

impl BackupArgs {
    pub(super) fn options(&self, run_id: &str) -> Result<backup::Options> {
        let options = backup::Options {
            sources: self.sources.clone(),
            recursive: self.recursive,
            output: (self.output.as_os_str() != "-").then(|| self.output.clone()),
            freeze: self.freeze.step()?,
            cow: self.freeze.cow()?,
            compression: self.compress.parse::<Compression>()?,
            no_freeze: self.freeze.no_freeze,
            all_blocks: self.freeze.all_blocks,
            on_read_error: self.freeze.on_read_error(),
            force: self.force,
            bounds: self.copying.bounds.or(Bounds::default()),
            hooks: self.freeze.hooks(),
            run_id: run_id.to_owned(),
        };
        self.freeze.refuse_torn()?;
        Ok(options)
    }
}

/// Bounds on what copying may take.
#[derive(Debug, Args)]
pub(super) struct CopyArgs {
    /// Move at most so many bytes a second (K, M, G, T: powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = above_zero)]
    rate: Option<ByteLen>,
    #[command(flatten)]
    bounds: BoundArgs,
}

/// Bounds on what work may take of the machine.
#[derive(Debug, Args)]
struct BoundArgs {
    /// Threads that do the work (default: one more than processors, or four times as many to write a
    /// target; 8 at most)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Hold at most so much in buffers, if need be with fewer threads (default 96M, at least 16M);
    /// `track` holds as much again for what changes last (default: 256M)
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<ByteLen>,
}

fn above_zero(text: &str) -> std::result::Result<ByteLen, String> {
    let size: ByteLen = text
        .parse()
        .map_err(|error: ParseSizeError| error.to_string())?;
    if size == ByteLen::ZERO {
        return Err("it must be more than 0".to_owned());
    }
    Ok(size)
}

fn memory(text: &str) -> std::result::Result<ByteLen, String> {
    let memory: ByteLen = text
        .parse()
        .map_err(|error: ParseSizeError| error.to_string())?;
    if memory < Bounds::LEAST_MEMORY {
        return Err(format!("{} is the least", Bounds::LEAST_MEMORY));
    }
    Ok(memory)
}

impl BoundArgs {
    fn or(&self, default: Bounds) -> Bounds {
        Bounds {
            threads: self.threads.map_or(default.threads, usize::from),
            memory: self.memory,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The image; `-` reads a stream from standard input
    image: PathBuf,
    /// A block device, a logical volume (VG/LV), a raw file (created if missing; if its name has a folder it
    /// begins with / or ./), or `-`: the raw volume on standard output. For a stream, a new dataset
    /// (POOL/NAME)
    #[arg(required_unless_present = "map", conflicts_with = "map")]
    target: Option<PathBuf>,
    /// Which volume of the image
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "target")]
    volume: Option<u32>,
    /// Restore volume N to TARGET; may be given several times
    #[arg(long, value_name = "N=TARGET")]
    map: Vec<String>,
    /// Do not ask before overwriting
    #[arg(long)]
    pub(super) yes: bool,
    /// Discard the target first
    #[arg(long)]
    discard: bool,
    /// Read the target back and compare
    #[arg(long)]
    verify: bool,
    /// Give a btrfs a new UUID (as `btrfstune -m` does), so that it can be used beside the original
    #[arg(long, conflicts_with = "allow_twin")]
    new_ids: bool,
    /// Write the copy even where it could not be used: its partition table or filesystem is for other
    /// sectors than the target has, or has to end where its device does
    #[arg(long)]
    allow_unusable: bool,
    /// Let a btrfs become visible twice on this machine, which may mix up both
    #[arg(long)]
    allow_twin: bool,
    /// From a damaged image, write all that is whole, zeros for the rest, list it, and exit with 4;
    /// the whole target is written
    #[arg(long, conflicts_with = "verify")]
    salvage: bool,
    /// Refuse an image whose image id, content id or root hash is another
    #[arg(long, value_name = "HASH")]
    expect_id: Option<String>,
    #[command(flatten)]
    copying: CopyArgs,
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

/// The id in `--expect-id`.
fn expected_id(text: Option<&String>) -> Result<Option<ExpectedId>> {
    text.map(|text| text.parse()).transpose()
}

impl RestoreArgs {
    pub(super) fn options(&self) -> Result<restore::Options> {
        let mut targets = Vec::new();
        if let Some(target) = &self.target {
            targets.push((self.volume.unwrap_or(0), target.clone()));
        }
        for text in &self.map {
            let wrong = || {
                Error::new(Kind::Usage, format!("`{text}` is no mapping"))
                    .hint("write the volume's number and its target: --map 2=/dev/sdb1")
            };
            let (number, target) = text.split_once('=').ok_or_else(wrong)?;
            let number: u32 = number
                .parse()
                .ok()
                .filter(|number| *number > 0)
                .ok_or_else(wrong)?;
            targets.push((number, PathBuf::from(target)));
        }
        Ok(restore::Options {
            image: self.image.clone(),
            targets,
            discard: self.discard,
            verify: self.verify,
            allow_unusable: self.allow_unusable,
            allow_twin: self.allow_twin,
            new_ids: self.new_ids,
            salvage: self.salvage,
            expect_id: expected_id(self.expect_id.as_ref())?,
            bounds: self.copying.bounds.or(Bounds::for_target()),
        })
    }
}

#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// A block device, a mount point, or a file that holds a raw disk
    source: String,
    /// A block device, a logical volume (VG/LV), or a raw file (created if missing; if its name has a
    /// folder it begins with / or ./)
    target: PathBuf,
    #[command(flatten)]
    freeze: FreezeArgs,
    /// Do not ask before overwriting
    #[arg(long)]
    pub(super) yes: bool,
    /// Discard the target first
    #[arg(long)]
    discard: bool,
    /// Read the target back and compare
    #[arg(long)]
    verify: bool,
    /// Give a btrfs a new UUID (as `btrfstune -m` does), so that it can be used beside the original
    #[arg(long, conflicts_with = "allow_twin")]
    new_ids: bool,
    /// Write the copy even where it could not be used: its partition table or filesystem is for other
    /// sectors than the target has, or has to end where its device does
    #[arg(long)]
    allow_unusable: bool,
    /// Let a btrfs become visible twice on this machine, which may mix up both
    #[arg(long)]
    allow_twin: bool,
    #[command(flatten)]
    copying: CopyArgs,
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl CloneArgs {
    pub(super) fn options(&self, run_id: &str) -> Result<clone::Options> {
        let options = clone::Options {
            source: self.source.clone(),
            target: self.target.clone(),
            freeze: self.freeze.step()?,
            cow: self.freeze.cow()?,
            no_freeze: self.freeze.no_freeze,
            all_blocks: self.freeze.all_blocks,
            on_read_error: self.freeze.on_read_error(),
            discard: self.discard,
            verify: self.verify,
            allow_unusable: self.allow_unusable,
            allow_twin: self.allow_twin,
            new_ids: self.new_ids,
            hooks: self.freeze.hooks(),
            bounds: self.copying.bounds.or(Bounds::for_target()),
            run_id: run_id.to_owned(),
        };
        self.freeze.refuse_torn()?;
        Ok(options)
    }
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The image; `-` reads a stream from standard input
    image: PathBuf,
    /// Also compare it with a device or raw file
    #[arg(long, value_name = "DEVICE")]
    against: Option<PathBuf>,
    /// Which volume to compare
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "against")]
    volume: Option<u32>,
    /// Refuse an image whose image id, content id or root hash is another
    #[arg(long, value_name = "HASH")]
    expect_id: Option<String>,
    #[command(flatten)]
    bounds: BoundArgs,
}

impl VerifyArgs {
    pub(super) fn options(&self) -> Result<verify::Options> {
        Ok(verify::Options {
            image: self.image.clone(),
            against: self.against.clone(),
            volume: self.volume.unwrap_or(0),
            expect_id: expected_id(self.expect_id.as_ref())?,
            bounds: self.bounds.or(Bounds::default()),
        })
    }
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A block device, mount point, raw file or image
    #[arg(value_name = "SOURCE-OR-IMAGE")]
    pub(super) what: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

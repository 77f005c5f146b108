//! What would tell of a write to a device that does not pass through the device itself, or past its
//! counters: the files behind loop devices, the disk that a partition lies on, the devices that a
//! mapping is built of, and the switch that turns the counters off.
//!
//! A device's own counters prove nothing of its content alone. A loop device shows what its file holds,
//! whoever wrote it there; a partition shows what was written to the disk. So each of these is watched
//! by what the kernel tells of it:
//!
//! | below | what proves that nobody wrote |
//! | --- | --- |
//! | the file of a loop device | nobody else has it open for writing (a search, which is the caller's), nobody who had it open has closed it (inotify), size and times are the same |
//! | the disk of a partition | its counters grew by the sum of those of its partitions |
//! | the devices of a mapping | nobody has closed their nodes who had them open for writing |
//! | `queue/iostats` | nobody has closed it who had it open for writing, and all that we read was counted |

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use crate::counters::{CounterFile, Counters};
use crate::error::Result;
use crate::exclusive::Stamp;
use crate::mounts::{self, Mount};
use crate::node::{BlockDevice, DeviceNumber, FileId};
use crate::os::close_watch::CloseWatch;
use crate::os::counters::COUNTS_READS;

/// Loop devices on loop devices are followed so deep.
const MOST_FILES: usize = 8;

/// Times of files are as coarse as the kernel's clock tick; two writes within one have the same.
const TICK: Duration = Duration::from_millis(20);

/// How long a disk may take to pause for a moment in which its counters can be added up.
const PAUSE: Duration = Duration::from_secs(2);

/// Watches what lies below a device.
#[derive(Debug)]
pub struct Witness {
    files: Files,
    /// Of a partition: its disk.
    disk: Option<DiskSum>,
    /// Devices that it is built of, and their nodes.
    lower: Option<Watched>,
    /// The device's own nodes: for where no counters are kept.
    own: Option<Watched>,
    /// The switches of the counters.
    switches: Option<Watched>,
}

/// Files that are watched together.
#[derive(Debug)]
struct Watched {
    watch: CloseWatch,
    names: Vec<PathBuf>,
}

impl Watched {
    /// Watches those of these files that can be opened; `None` if there is none.
    fn open(paths: impl IntoIterator<Item = PathBuf>) -> Option<Self> {
        let watch = CloseWatch::new().ok()?;
        let mut names = Vec::new();
        for path in paths {
            if let Ok(file) = File::open(&path)
                && watch.add(&file).is_ok()
            {
                names.push(path);
            }
        }
        (!names.is_empty()).then_some(Self { watch, names })
    }

    /// Whether somebody had one of them open for writing and closed it. If that cannot be told: yes.
    fn was_written(&self) -> bool {
        self.watch.was_written().unwrap_or(true)
    }

    fn text(&self) -> String {
        let names: Vec<_> = self
            .names
            .iter()
            .map(|name| name.display().to_string())
            .collect();
        names.join(", ")
    }
}

impl Witness {
    /// Begins to watch what lies below `device`. To be called before users are searched for, so that
    /// nobody is missed between the two.
    ///
    /// # Errors
    /// If sysfs makes no sense.
    pub fn of_device(device: &BlockDevice) -> Result<Self> {
        let below = Below::of(device)?;
        let nodes = |device: &BlockDevice| {
            let mut nodes = vec![device.path()];
            nodes.extend(device.mapper_path());
            nodes
        };
        let switch = |device: &BlockDevice| device.disk_sysfs().join("queue/iostats");
        Ok(Self {
            files: Files::open(&below),
            disk: match device.is_whole_disk() {
                true => None,
                false => DiskSum::of(device)?,
            },
            lower: Watched::open(below.devices.iter().flat_map(nodes)),
            own: Watched::open(nodes(device)),
            switches: Watched::open(std::iter::once(device).chain(&below.devices).map(switch)),
        })
    }

    /// What below the device cannot be watched, in words; `None` if all can be.
    pub fn blind_spot(&self) -> Option<&str> {
        self.files.blind_spot.as_deref()
    }

    /// Whether somebody else than the kernel may have written below the device since the watch began,
    /// and how that shows, in words. `read`: how many sectors of 512 bytes were read of the device past
    /// the page cache, and the counters before. Users have to be searched for right before this.
    ///
    /// # Errors
    /// If files or counters cannot be read any more.
    pub fn trace_of_writing(
        &self,
        read: Option<(u64, &Counters, &Counters)>,
    ) -> io::Result<Option<String>> {
        if let Some(why) = self.trace_of_writing_to_files() {
            return Ok(Some(why));
        }
        if let Some(lower) = self.lower.as_ref().filter(|lower| lower.was_written()) {
            let names = lower.text();
            return Ok(Some(format!(
                "somebody had a device below it open for writing ({names})"
            )));
        }
        if self.switches.as_ref().is_some_and(Watched::was_written) {
            return Ok(Some(
                "somebody set whether the kernel counts writes (queue/iostats)".to_owned(),
            ));
        }
        if let Some((sectors, before, now)) = read
            && COUNTS_READS
            && now.reads.since(before.reads).sectors < sectors
        {
            return Ok(Some(
                "the kernel did not count all that was read meanwhile (queue/iostats)".to_owned(),
            ));
        }
        match &self.disk {
            Some(disk) if !disk.is_unchanged()? => {
                let name = &disk.name;
                Ok(Some(format!("{name} was written to past its partitions")))
            }
            _ => Ok(None),
        }
    }

    /// Whether it would be told that somebody had the device itself open for writing.
    pub fn watches_its_nodes(&self) -> bool {
        self.own.is_some()
    }

    /// Whether somebody had the device itself open for writing and closed it since the watch began;
    /// also if that cannot be told. For where no counters tell of writes.
    pub fn was_opened_for_writing(&self) -> bool {
        self.own.as_ref().is_none_or(Watched::was_written)
    }

    /// Whether somebody had a file behind a loop device below open for writing and closed it, in words.
    pub fn trace_of_writing_to_files(&self) -> Option<String> {
        let Files { open, watch, .. } = &self.files;
        let was_written = watch
            .as_ref()
            .is_none_or(|watch| watch.was_written().unwrap_or(true));
        let names: Vec<_> = open
            .iter()
            .map(|(_, name)| name.display().to_string())
            .collect();
        (!open.is_empty() && was_written).then(|| {
            let names = names.join(", ");
            format!("somebody had the file below it open for writing ({names})")
        })
    }

    /// Whether size and times of the files behind loop devices below are what they were when the watch
    /// began: for a device that nobody writes to. Where other partitions of its disk were written to,
    /// they tell nothing.
    ///
    /// # Errors
    /// What `stat(2)` says, or reading counters.
    pub fn files_are_unchanged(&self) -> io::Result<bool> {
        if let Some(disk) = &self.disk
            && !disk.disk.read()?.nothing_written_since(&disk.at_first)
        {
            return Ok(true);
        }
        Ok(self.files.stamps()? == self.files.before)
    }

    /// Size and times of the files behind loop devices below, as they are now. Allocates nothing: for
    /// while a filesystem is frozen.
    ///
    /// # Errors
    /// What `stat(2)` says.
    pub fn stamps(&self) -> io::Result<Stamps> {
        let disk = self.disk.as_ref().map(|disk| disk.disk.read());
        Ok(Stamps {
            files: self.files.stamps()?,
            disk: disk
                .transpose()?
                .map(|counted| counted.changed_sectors_since(&Counters::default())),
        })
    }
}

/// Size and times of files at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamps {
    files: FileStamps,
    /// Of a partition: what its disk had counted.
    disk: Option<u64>,
}

type FileStamps = [Option<Stamp>; MOST_FILES];

impl Stamps {
    /// Whether a file was changed since `earlier`, other than by what was written to neighbours of a
    /// partition: where there was any of that, the file tells nothing.
    pub fn tell_of_writing_since(&self, earlier: &Self) -> bool {
        self.files != earlier.files && self.disk == earlier.disk
    }
}

/// What a device lies on.
#[derive(Debug, Default)]
struct Below {
    /// Devices that a mapping is built of, and their disks.
    devices: Vec<BlockDevice>,
    /// The files of loop devices: which, and by what name.
    files: Vec<(FileId, PathBuf)>,
}

impl Below {
    fn of(device: &BlockDevice) -> Result<Self> {
        let mut below = Self::default();
        below.add(device)?;
        Ok(below)
    }

    fn add(&mut self, device: &BlockDevice) -> Result<()> {
        let mut numbers: Vec<DeviceNumber> = device.lower_devices()?;
        if let Some(backing) = device.loop_backing()? {
            match backing.device {
                Some(lower) => numbers.push(lower),
                None => self.files.push((backing.file, backing.path)),
            }
        }
        for number in numbers {
            if self.devices.iter().all(|known| known.number != number) {
                let lower = BlockDevice::of(number)?;
                self.devices.push(lower.clone());
                if !lower.is_whole_disk() {
                    self.devices.push(BlockDevice::of(lower.disk)?);
                }
                self.add(&lower)?;
            }
        }
        Ok(())
    }
}

/// The files behind loop devices.
#[derive(Debug)]
struct Files {
    open: Vec<(File, PathBuf)>,
    watch: Option<CloseWatch>,
    before: FileStamps,
    blind_spot: Option<String>,
}

impl Files {
    fn open(below: &Below) -> Self {
        let mut files = Self {
            open: Vec::new(),
            watch: CloseWatch::new().ok(),
            before: FileStamps::default(),
            blind_spot: None,
        };
        let overlays = mounts::of_this_process().unwrap_or_default();
        for (id, path) in &below.files {
            if let Err(why) = files.add(*id, path, &overlays) {
                let name = path.display();
                files.blind_spot = Some(format!(
                    "who writes to the file below, {name}, cannot be seen: {why}"
                ));
            }
        }
        files
    }

    fn add(
        &mut self,
        id: FileId,
        path: &PathBuf,
        mounts: &[Mount],
    ) -> std::result::Result<(), String> {
        if self.open.len() == MOST_FILES {
            return Err("there are too many".to_owned());
        }
        let file = File::open(path).map_err(|error| error.to_string())?;
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        if FileId::of(&metadata) != id {
            return Err("another file has its name".to_owned());
        }
        match &self.watch {
            Some(watch) => watch.add(&file).map_err(|error| error.to_string())?,
            None => return Err("this system tells nobody of it".to_owned()),
        }
        wait_for_the_next_tick(&metadata);
        self.open.push((file, path.clone()));
        self.before = self.stamps().map_err(|error| error.to_string())?;
        match overlay_over(path, id, mounts) {
            None => Ok(()),
            Some(overlay) => {
                let point = overlay.point.display();
                Err(format!("it can be written through the overlay at {point}"))
            }
        }
    }

    fn stamps(&self) -> io::Result<FileStamps> {
        let mut stamps = [None; MOST_FILES];
        for (stamp, (file, _)) in stamps.iter_mut().zip(&self.open) {
            *stamp = Some(Stamp::of(&file.metadata()?));
        }
        Ok(stamps)
    }
}

/// The overlay filesystem through which the file at `path` can be written.
fn overlay_over<'a>(path: &PathBuf, id: FileId, mounts: &'a [Mount]) -> Option<&'a Mount> {
    let path = std::fs::canonicalize(path).ok()?;
    mounts
        .iter()
        .filter(|mount| mount.fs_type == "overlay")
        .find(|mount| {
            let upper = mount
                .super_options
                .split(',')
                .find_map(|option| option.strip_prefix("upperdir="));
            let upper = upper.and_then(|upper| std::fs::canonicalize(upper).ok());
            upper.is_some_and(|upper| {
                let same = std::fs::metadata(&upper)
                    .is_ok_and(|it| FileId::of(&it).filesystem == id.filesystem);
                same && path.starts_with(&upper)
            })
        })
}

/// Waits until a write from now on has another time than that of the last change.
fn wait_for_the_next_tick(metadata: &std::fs::Metadata) {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let changed = metadata.ctime().max(metadata.mtime());
    let now = since_epoch.map_or(0, |now| now.as_secs());
    // To the second is enough: a needless wait is short.
    if changed + 1 >= now.cast_signed() {
        std::thread::sleep(TICK);
    }
}

/// What a disk counted beyond its partitions.
#[derive(Debug)]
struct DiskSum {
    name: String,
    disk: CounterFile,
    partitions: Vec<CounterFile>,
    /// What the disk had counted when the watch began.
    at_first: Counters,
    /// `None` if it never paused.
    before: Option<u64>,
}

impl DiskSum {
    /// `None` where the disk counts nothing.
    fn of(partition: &BlockDevice) -> Result<Option<Self>> {
        let disk = BlockDevice::of(partition.disk)?;
        if !crate::counters::are_kept(&disk).unwrap_or(false) {
            return Ok(None);
        }
        let mut partitions = Vec::new();
        for partition in disk.partitions()? {
            partitions.push(CounterFile::open(partition.number)?);
        }
        let mut sum = Self {
            name: disk.name.clone(),
            at_first: Counters::of(disk.number)?,
            disk: CounterFile::open(disk.number)?,
            partitions,
            before: None,
        };
        sum.before = sum.beyond().ok().flatten();
        Ok(Some(sum))
    }

    /// Sectors that were written to the disk itself so far. The kernel counts what is written to a
    /// partition for both at once.
    fn beyond(&self) -> io::Result<Option<u64>> {
        let changed = |file: &CounterFile| {
            let now = file.read()?;
            Ok::<_, io::Error>(now.changed_sectors_since(&Counters::default()))
        };
        let begin = Instant::now();
        while begin.elapsed() < PAUSE {
            let before = changed(&self.disk)?;
            let mut sum = 0u64;
            for partition in &self.partitions {
                sum = sum.wrapping_add(changed(partition)?);
            }
            if changed(&self.disk)? == before {
                return Ok(Some(before.wrapping_sub(sum)));
            }
        }
        Ok(None)
    }

    /// Whether nothing was; a disk that never pauses tells nothing, so the answer is no.
    fn is_unchanged(&self) -> io::Result<bool> {
        let Some(before) = self.before else {
            return Ok(false);
        };
        Ok(self.beyond()? == Some(before))
    }
}

//! What sources and targets may be called, and standard output as a target.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::holdstill::{command, finish, listing, run, same_bytes};
use crate::common::scene::{SIZE, Scene};
use crate::common::volume::{ext4, poisoned_file};
use crate::common::{
    LoopDevice, Mount, Partition, command as tool_command, needs_root, run as tool, sparse_file,
    spawn, temp_dir,
};

/// Runs the program in a folder.
fn run_in(dir: &Path, args: &[&str]) -> crate::common::holdstill::Run {
    let mut program = command(args);
    program.current_dir(dir);
    finish(program)
}

fn blkid(device: &Path, tag: &str) -> String {
    let args = ["-p", "-o", "value", "-s", tag].map(Path::new);
    let value = tool("blkid", args.into_iter().chain([device]));
    value.trim().to_owned()
}

/// A label that no other test or disk has.
fn own_label(prefix: &str) -> String {
    format!("{prefix} {}", std::process::id())
}

#[test]
fn privileged_a_source_is_found_by_its_label_or_uuid() {
    needs_root!();
    let dir = temp_dir();
    let [file, image] = ["file", "image"].map(|part| dir.path().join(part));
    ext4(&file, SIZE, "", None);
    let label = own_label("hs");
    tool("tune2fs", [Path::new("-L"), Path::new(&label), &file]);
    let device = LoopDevice::attach(&file);
    let uuid = blkid(device.path(), "UUID");
    let names = [
        format!("LABEL={label}"),
        format!("UUID={uuid}"),
        format!("UUID={}", uuid.to_uppercase()),
    ];
    for name in &names {
        let report = run(["inspect", "--json", name]).expect(0).last();
        assert_eq!(report["path"], device.path().to_str().unwrap(), "{name}");
    }
    let output = ["-o", image.to_str().unwrap()];
    run(["backup", &names[0]].into_iter().chain(output)).expect(0);
    let mount = Mount::new(device.path(), &dir.path().join("mounted"), "ext4", "");
    let report = run(["inspect", "--json", &names[1]]).expect(0).last();
    assert_eq!(report["mounted_at"], mount.dir().to_str().unwrap());
    drop(mount);
    // Nothing has it, and then two have it.
    run(["inspect", &format!("LABEL={label}x")])
        .expect(1)
        .says("no block device");
    let twin = LoopDevice::attach(&file);
    run(["inspect", &names[1]])
        .expect(2)
        .says("more than one device");
    drop(twin);
    // A file of that name has to be named as one.
    std::fs::write(dir.path().join(&names[1]), "").unwrap();
    run_in(dir.path(), &["inspect", &names[1]])
        .expect(2)
        .says("./UUID=");
    let target = dir.path().join("target");
    poisoned_file(&target, SIZE);
    let args = ["clone", "--yes", &names[0], target.to_str().unwrap()];
    run(args).expect(0);
    assert_eq!(blkid(&target, "UUID"), uuid);
}

/// A GPT with one partition, of so many sectors from 2048 on.
fn gpt(disk: &Path, sectors: u64, name: &str) {
    let mut bytes = vec![0; 34 * 512];
    bytes[450] = 0xee;
    bytes[454..458].copy_from_slice(&1u32.to_le_bytes());
    bytes[458..462].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    let entry = &mut bytes[1024..1152];
    entry[..16].fill(9);
    entry[16..32].copy_from_slice(&uuid::Uuid::new_v4().to_bytes_le());
    entry[32..40].copy_from_slice(&2048u64.to_le_bytes());
    entry[40..48].copy_from_slice(&(2048 + sectors - 1).to_le_bytes());
    for (at, unit) in (56..).step_by(2).zip(name.encode_utf16()) {
        entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
    }
    let entries = crc32fast::hash(&bytes[1024..]);
    let header = &mut bytes[512..604];
    header[..12].copy_from_slice(b"EFI PART\0\0\x01\0");
    header[12..16].copy_from_slice(&92u32.to_le_bytes());
    for (at, lba) in [(24, 1u64), (40, 34), (48, 40_000), (72, 2)] {
        header[at..at + 8].copy_from_slice(&lba.to_le_bytes());
    }
    header[80..84].copy_from_slice(&128u32.to_le_bytes());
    header[84..88].copy_from_slice(&128u32.to_le_bytes());
    header[88..92].copy_from_slice(&entries.to_le_bytes());
    let crc = crc32fast::hash(header);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    let file = OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
}

#[test]
fn privileged_a_source_is_found_by_its_partition() {
    needs_root!();
    let dir = temp_dir();
    let disk = dir.path().join("disk");
    sparse_file(&disk, SIZE);
    let label = own_label("part");
    gpt(&disk, 20_480, &label);
    let device = LoopDevice::attach(&disk);
    let partition = Partition::add(device.path(), 1, 2048, 20_480);
    let uuid = blkid(partition.node(), "PART_ENTRY_UUID");
    for name in [format!("PARTLABEL={label}"), format!("PARTUUID={uuid}")] {
        let report = run(["inspect", "--json", &name]).expect(0).last();
        assert_eq!(report["path"], partition.node().to_str().unwrap(), "{name}");
    }
    // The kernel was told of a partition that the table does not have.
    drop(partition);
    let _other = Partition::add(device.path(), 1, 4096, 8192);
    run(["inspect", &format!("PARTUUID={uuid}")]).expect(1);
}

#[test]
fn a_target_is_not_found_by_label() {
    let scene = Scene::new();
    let image = scene.image.to_str().unwrap();
    let source = scene.source.to_str().unwrap();
    for target in ["LABEL=a", "UUID=1", "PARTLABEL=a", "PARTUUID=a"] {
        run_in(scene.dir.path(), &["restore", image, target])
            .expect(2)
            .says("by its device");
        run_in(scene.dir.path(), &["clone", source, target])
            .expect(2)
            .says("by its device");
    }
    run_in(scene.dir.path(), &["clone", source, "-"])
        .expect(2)
        .says("device or file");
    assert_eq!(listing(scene.dir.path()), ["image", "source"]);
}

/// What looks like a volume is never a file that would have to be made.
#[test]
fn a_volume_that_is_missing_is_not_made_as_a_file() {
    let scene = Scene::new();
    let folder = scene.path("vg");
    std::fs::create_dir(&folder).unwrap();
    let image = scene.image.to_str().unwrap();
    let source = scene.source.to_str().unwrap();
    for target in ["vg/new", "lvm:vg/new", "zfs:vg/new", "none/new", "vg/a/new"] {
        for args in [["restore", image, target], ["clone", source, target]] {
            run_in(scene.dir.path(), &args)
                .expect(3)
                .says("there is no such");
        }
        let map = format!("1={target}");
        run_in(scene.dir.path(), &["restore", image, "--map", &map]).expect(3);
    }
    assert_eq!(listing(&folder).len(), 0);
    run_in(scene.dir.path(), &["restore", image, "./vg/new"]).expect(0);
    // What is there is what it is.
    run_in(scene.dir.path(), &["clone", "--yes", source, "vg/new"]).expect(0);
    tool("e2fsck", [Path::new("-fn"), &folder.join("new")]);
    assert_eq!(listing(scene.dir.path()), ["image", "source", "vg"]);
}

#[test]
fn a_volume_is_written_raw_to_standard_output() {
    let scene = Scene::new();
    let file = scene.path("restored");
    run([Path::new("restore"), &scene.image, &file]).expect(0);
    let restore = [Path::new("restore"), &scene.image, Path::new("-")];
    let plain = finish({
        let mut program = command(restore);
        program.current_dir(scene.dir.path());
        program
    })
    .expect(0);
    assert!(plain.stdout == std::fs::read(&file).unwrap());
    assert!(
        plain.stderr.contains("volume 1 is restored to -"),
        "{plain}"
    );
    let json = run(restore.into_iter().chain([Path::new("--json")])).expect(0);
    assert!(json.stdout == std::fs::read(&file).unwrap());
    assert_eq!(json.last()["targets"][0]["path"], "-");
    let map = ["--map", "1=-"].map(Path::new);
    let mapped = run([Path::new("restore"), &scene.image].into_iter().chain(map)).expect(0);
    assert!(mapped.stdout == plain.stdout);
    let dry = run(restore.into_iter().chain([Path::new("--dry-run")])).expect(0);
    assert!(dry.stdout.is_empty() && dry.stderr.contains("would copy volume 1"));
    for option in [
        "--verify",
        "--discard",
        "--salvage",
        "--new-ids",
        "--allow-twin",
    ] {
        let refused = run(restore.into_iter().chain([Path::new(option)])).expect(2);
        assert!(refused.stdout.is_empty());
    }
    run(["restore", "-", "-"]).expect(2).says("in a file");
    assert_eq!(listing(scene.dir.path()), ["image", "restored", "source"]);
    // Nothing of a damaged image is written.
    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&scene.image)
        .unwrap();
    let mut byte = [0];
    let at = image.metadata().unwrap().len() / 2;
    image.read_exact_at(&mut byte, at).unwrap();
    image.write_all_at(&[byte[0] ^ 1], at).unwrap();
    assert!(run(restore).expect(4).stdout.is_empty());
}

/// Also what was written more than once, and one volume of several.
#[test]
fn any_image_is_written_raw_to_standard_output() {
    let dir = temp_dir();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, volume) in [
        ("plain", "1"),
        ("superseded", "1"),
        ("volumes", "1"),
        ("volumes", "2"),
    ] {
        let image = golden.join(format!("{name}.still"));
        let [file, raw] =
            ["file", "raw"].map(|part| dir.path().join(format!("{name}{volume}.{part}")));
        let options = ["--volume", volume].map(Path::new);
        run([Path::new("restore"), &image, &file]
            .into_iter()
            .chain(options))
        .expect(0);
        let args = [Path::new("restore"), &image, Path::new("-")];
        let written = run(args.into_iter().chain(options)).expect(0).stdout;
        std::fs::write(&raw, written).unwrap();
        assert_eq!(
            raw.metadata().unwrap().len(),
            file.metadata().unwrap().len()
        );
        // What was in use once and is not any more a restore leaves alone; else they are equal.
        assert!(name == "superseded" || same_bytes(&file, &raw), "{name}");
        let args = [Path::new("verify"), &image, Path::new("--against"), &raw];
        run(args.into_iter().chain(options)).expect(0);
    }
    let several = golden.join("volumes.still");
    run([Path::new("restore"), &several, Path::new("-")])
        .expect(2)
        .says("--volume");
}

#[test]
fn a_disk_is_not_written_to_a_terminal() {
    let scene = Scene::new();
    let [program, image, source] = [
        Path::new(env!("CARGO_BIN_EXE_holdstill")),
        &scene.image,
        &scene.source,
    ]
    .map(|path| path.to_str().unwrap());
    for line in [
        format!("{program} restore {image} -"),
        format!("{program} backup {source} -o -"),
    ] {
        let mut terminal = tool_command("script", ["-q", "-e", "-c", &line, "/dev/null"]);
        terminal.current_dir(scene.dir.path());
        terminal.stdin(Stdio::null()).stdout(Stdio::piped());
        let output = spawn(&mut terminal).wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("is a terminal") && text.len() < 500, "{text}");
    }
    assert_eq!(listing(scene.dir.path()), ["image", "source"]);
}

#[test]
fn privileged_an_image_says_where_it_is_from() {
    needs_root!();
    let dir = temp_dir();
    let [file, image] = ["file", "image"].map(|part| dir.path().join(part));
    ext4(&file, SIZE, "", None);
    let device = LoopDevice::attach(&file);
    let mount = Mount::new(device.path(), &dir.path().join("mounted here"), "ext4", "");
    run([Path::new("backup"), mount.dir(), Path::new("-o"), &image]).expect(0);
    let inspect = [Path::new("inspect"), &image];
    let json = run(inspect.into_iter().chain([Path::new("--json")]))
        .expect(0)
        .last();
    let point = mount.dir().to_str().unwrap();
    assert_eq!(json["manifest"]["volumes"][0]["mount_point"], point);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(json["manifest"]["host"], host.trim());
    let id: Option<PathBuf> = Some("/etc/machine-id".into()).filter(|path: &PathBuf| path.exists());
    let id = id.map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned());
    let id = id.filter(|id| id.len() == 32);
    assert_eq!(json["manifest"]["machine_id"].as_str(), id.as_deref());
    let text = String::from_utf8(run(inspect).expect(0).stdout).unwrap();
    assert!(text.contains(&format!("mounted at {point}")), "{text}");
    assert!(text.contains(&format!("host {}", host.trim())), "{text}");
    // What the image has no such field for, is not said.
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain.still");
    let text = String::from_utf8(run([Path::new("inspect"), &old]).expect(0).stdout).unwrap();
    assert!(
        !text.contains("on host") && !text.contains("mounted at"),
        "{text}"
    );
}

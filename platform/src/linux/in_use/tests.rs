use std::fs::{File, OpenOptions};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::node::Node;
use crate::testing::{Loop, Mounted, Role, mkfs, needs_root, run, scratch, scratch_on_disk};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Who uses it, but for those who pass: other tests on their way through all loop devices, and processes
/// of this test that have inherited its open files until they run their programs.
fn lasting(look: impl Fn() -> Users) -> Users {
    let passes = |user: &User| matches!(user, User::Writer { command, .. } if command == "losetup");
    let mut found = look();
    for _ in 0..10 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        let again = look();
        found
            .users
            .retain(|user| !passes(user) && again.users.contains(user));
    }
    found
}

fn of(path: &Path) -> Users {
    lasting(|| of_device(&BlockDevice::at(path).unwrap(), &[]).unwrap())
}

fn of_path(file: &Path) -> Users {
    let id = file_id(file);
    lasting(|| of_file(id, &[]).unwrap())
}

fn file_id(path: &Path) -> FileId {
    Node::of(path).unwrap().id
}

/// A process that has `path` open as `how` says (in shell) until it is dropped.
struct Holding(Child);

impl Holding {
    fn new(how: &str, path: &Path) -> Self {
        let script = format!("exec {how} \"$0\"; echo ready; read x");
        let mut child = Command::new("/bin/sh")
            .args(["-c", &script])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        let stdout = child.stdout.as_mut().unwrap();
        io::Read::read_exact(stdout, &mut ready).unwrap();
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_writer(user: &User, pid: i32) -> bool {
    matches!(user, User::Writer { pid: found, .. } if *found == pid)
}

#[test]
fn maps_and_names() {
    let line = b"7f00-7f10 rw-s 00000000 00:05 12 /dev/x";
    assert_eq!(shared_writable(line), Some(OsStr::new("7f00-7f10")));
    assert_eq!(shared_writable(b"7f00-7f10 rw-p 0 0:0 0"), None);
    assert_eq!(shared_writable(b"7f00-7f10 r--s 0 0:0 0"), None);
    assert_eq!(shared_writable(b""), None);
    let mount = User::Mount {
        point: "/mnt/x".into(),
        fs_type: "ext4".to_owned(),
        read_only: false,
        is_stopped: false,
        elsewhere: Some(7),
    };
    assert_eq!(
        mount.to_string(),
        "mounted at /mnt/x (rw) in the mount namespace of process 7"
    );
    assert!(swaps().is_ok());
}

#[test]
fn a_writer_of_a_file_is_found_a_reader_is_not() {
    let dir = scratch();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let id = file_id(&file);
    assert_eq!(of_path(&file).users, []);
    let reader = Holding::new("7<", &file);
    assert_eq!(of_path(&file).users, []);
    let writer = Holding::new("7<>", &file);
    std::fs::rename(&file, dir.path().join("other name")).unwrap();
    let found = of_file(id, &[]).unwrap().users;
    let [
        User::Writer {
            pid,
            command,
            path,
            mapped,
        },
    ] = found.as_slice()
    else {
        panic!("{found:?}");
    };
    assert_eq!(
        (*pid, command.as_str(), *mapped),
        (writer.pid(), "sh", false)
    );
    assert!(path.ends_with("other name"), "{}", path.display());
    assert_eq!(of_file(id, &[writer.pid()]).unwrap().users, []);
    drop(reader);
}

#[test]
fn privileged_a_loop_device_is_found_from_its_file_and_from_its_twin() {
    needs_root!();
    let dir = scratch();
    let file = dir.path().join("disk");
    let device = Loop::sparse(&file, 64 << 20);
    let on_device = [User::Loop {
        device: device.number(),
        name: device
            .path()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned(),
        read_only: false,
    }];
    assert_eq!(of(device.path()).users, []);
    assert_eq!(of_path(&file).users, on_device);

    let twin = Loop::attach(&file, &["-r"]);
    let found = of(device.path()).users;
    assert!(
        matches!(found.as_slice(), [User::Loop { device, read_only: true, .. }] if *device == twin.number()),
        "{found:?}"
    );
    assert!(!found[0].may_write());
    assert_eq!(of(twin.path()).users, on_device);
    drop(twin);

    // Stacked: the upper one is a user of the lower one, a writer below is one of the upper.
    let upper = Loop::attach(device.path(), &[]);
    assert!(matches!(&of(device.path()).users[..], [User::Loop { .. }]));
    assert_eq!(of(upper.path()).users, []);
    let below = Holding::new("7<>", &file);
    let found = of(upper.path()).users;
    assert!(
        found.len() == 1 && is_writer(&found[0], below.pid()),
        "{found:?}"
    );
}

#[test]
fn privileged_mounts_are_found_also_in_other_namespaces() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 64 << 20);
    mkfs("ext4", device.path());
    let point = dir.path().join("mnt");
    let mounted = Mounted::new(device.path(), &point, "ro");
    let found = of(device.path()).users;
    assert!(
        matches!(&found[..], [User::Mount { point: at, read_only: true, elsewhere: None, .. }] if *at == point),
        "{found:?}"
    );
    assert!(!found[0].may_write());
    drop(mounted);

    let script = "mount \"$0\" /mnt && echo ready; read x; umount /mnt";
    let mut child = Command::new("unshare")
        .args(["-m", "/bin/sh", "-c", script])
        .arg(device.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let found = of(device.path()).users;
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(
        matches!(&found[..], [User::Mount { point, elsewhere: Some(_), .. }] if point == Path::new("/mnt")),
        "{found:?}"
    );
    assert_eq!(of(device.path()).users, []);
}

#[test]
fn privileged_writers_are_found_through_disk_partition_and_memory() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 8 << 20);
    let first = device.add_partition(1, 2048, 4096);
    let second = device.add_partition(2, 8192, 4096);

    let writer = Holding::new("7<>", &first);
    let found = of(device.path()).users;
    assert!(
        found.len() == 1 && is_writer(&found[0], writer.pid()),
        "{found:?}"
    );
    assert!(is_writer(&of(&first).users[0], writer.pid()));
    assert_eq!(of(&second).users, [], "a neighbour's writer is no user");
    drop(writer);

    let writer = Holding::new("7<>", device.path());
    assert!(is_writer(&of(&second).users[0], writer.pid()));
    drop(writer);

    let reader = Holding::new("7<", device.path());
    assert_eq!(of(device.path()).users, []);
    drop(reader);

    // A mapping outlives its descriptor.
    let mapper = Role::start("linux::in_use::tests::role_map", &[&first]);
    let found = of(device.path()).users;
    assert!(
        matches!(&found[..], [User::Writer { pid, mapped: true, .. }] if *pid == mapper.pid()),
        "{found:?}"
    );
}

#[test]
fn role_map() {
    let Some(args) = Role::args() else { return };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&args[0])
        .unwrap();
    let writable = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let length = std::num::NonZeroUsize::new(4096).unwrap();
    // SAFETY: a new mapping at a place of the kernel's choice that nobody accesses.
    let mapped = unsafe { mmap(None, length, writable, MapFlags::MAP_SHARED, &file, 0) };
    mapped.unwrap();
    drop(file);
    Role::ready_until_told();
}

#[test]
fn privileged_what_is_hidden_is_counted() {
    needs_root!();
    let dir = scratch();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let mut nobody = Role::start(
        "linux::in_use::tests::role_nobody",
        &[&dir.path().join("file")],
    );
    let hidden: usize = nobody.expect("hidden").parse().unwrap();
    assert!(hidden > 0);
}

#[test]
fn role_nobody() {
    let Some(args) = Role::args() else { return };
    let file = file_id(&args[0]);
    nix::unistd::setuid(nix::unistd::Uid::from_raw(65534)).unwrap();
    let found = of_file(file, &[]).unwrap();
    Role::say("ready");
    Role::say(&format!("hidden {}", found.hidden_processes));
}

#[test]
fn privileged_swap_is_found() {
    needs_root!();
    let dir = scratch_on_disk();
    let device = Loop::sparse(&dir.path().join("disk"), 8 << 20);
    let partition = device.add_partition(1, 2048, 8192);
    run("mkswap", [&partition]);
    run("swapon", [&partition]);
    let found = of(device.path()).users;
    run("swapoff", [&partition]);
    assert_eq!(found, [User::Swap { path: partition }]);
}

#[test]
fn our_own_descriptors_do_not_count() {
    let dir = scratch();
    let path = dir.path().join("file");
    let file = File::create(&path).unwrap();
    let again = OpenOptions::new().append(true).open(&path).unwrap();
    assert_eq!(of_path(&path).users, []);
    drop((file, again));
}

#[test]
fn privileged_what_a_new_process_has_only_for_a_moment_is_not_held_against_it() {
    needs_root!();
    let dir = scratch();
    let device = Loop::sparse(&dir.path().join("disk"), 8 << 20);
    let node = device.path().to_str().unwrap();
    // It has the device open when it begins, and then no more.
    let moment = format!("exec 7<>{node}; echo; sleep 0.05; exec 7>&-; exec sleep 100");
    let lasting = format!("exec 7<>{node}; echo; exec sleep 100");
    for (script, expected) in [(moment, 0), (lasting, 1)] {
        let mut child = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let found = of(device.path()).users;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.len(), expected, "{found:?}");
    }
}

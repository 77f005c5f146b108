//! In somebody else's folder every name may lead elsewhere by the next moment. Root writes to what it
//! looked up and examined, or not at all.

use std::ffi::OsString;
use std::os::unix::fs::{chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::common::holdstill::{listing, run};
use crate::common::scene::{SIZE, Scene};
use crate::common::volume::poisoned_file;
use crate::common::{count, needs_root};

const NOBODY: Option<u32> = Some(65534);

/// Somebody who puts a link to `victim` in the place of `path`, and `path` back, all the time.
struct Swapper {
    path: PathBuf,
    aside: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Swapper {
    fn start(path: &Path, victim: &Path) -> Self {
        let aside = path.with_extension("aside");
        let stop = Arc::new(AtomicBool::new(false));
        let (place, victim) = (path.to_owned(), victim.to_owned());
        let thread = {
            let (stop, aside) = (stop.clone(), aside.clone());
            std::thread::spawn(move || {
                let link = place.with_extension("link");
                while !stop.load(Ordering::Relaxed) {
                    symlink(&victim, &link).unwrap();
                    lchown(&link, NOBODY, NOBODY).unwrap();
                    std::fs::rename(&place, &aside).unwrap();
                    std::fs::rename(&link, &place).unwrap();
                    std::thread::yield_now();
                    std::fs::remove_file(&place).unwrap();
                    std::fs::rename(&aside, &place).unwrap();
                    std::thread::yield_now();
                }
            })
        };
        Self {
            path: path.to_owned(),
            aside,
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it; what it was about to do may have failed over what the program made.
    fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
        if self.aside.exists() {
            let _ = std::fs::remove_file(&self.path);
            std::fs::rename(&self.aside, &self.path).unwrap();
        }
    }
}

/// A folder of somebody else.
fn strangers_folder(scene: &Scene) -> PathBuf {
    let folder = scene.path("folder");
    std::fs::create_dir(&folder).unwrap();
    chown(&folder, NOBODY, NOBODY).unwrap();
    folder
}

/// Ends with success, a refusal or a failure, never worse.
fn try_it<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> i32 {
    let run = run(args);
    let code = run.code().unwrap();
    assert!([0, 1, 3].contains(&code), "{run}");
    code
}

#[test]
fn privileged_nothing_is_restored_through_a_link_that_was_swapped_in() {
    needs_root!();
    let scene = Scene::new();
    let folder = strangers_folder(&scene);
    let [target, victim] = [folder.join("target"), scene.path("victim")];
    poisoned_file(&victim, SIZE);
    let before = std::fs::read(&victim).unwrap();
    let mut done = 0;
    for _ in 0..count(10, 60) {
        poisoned_file(&target, SIZE);
        let swapper = Swapper::start(&target, &victim);
        done += i32::from(try_it(scene.restore_to(&target)) == 0);
        swapper.stop();
        assert!(
            before == std::fs::read(&victim).unwrap(),
            "the victim was overwritten"
        );
    }
    println!("{done} were restored");
}

#[test]
fn privileged_no_image_goes_to_a_folder_that_was_swapped_in() {
    needs_root!();
    let scene = Scene::new();
    let folder = strangers_folder(&scene);
    let [own, victim] = [folder.join("own"), scene.path("victim")];
    std::fs::create_dir(&own).unwrap();
    std::fs::create_dir(&victim).unwrap();
    std::fs::write(victim.join("image"), "precious").unwrap();
    let image = own.join("image");
    let names: Vec<OsString> = vec!["image".into()];
    for n in 0..count(10, 60) {
        let swapper = Swapper::start(&own, &victim);
        let args = ["backup", "--force", "-o"].map(Path::new).into_iter();
        try_it(args.chain([image.as_path(), &scene.source]));
        // Also an image that was made before the folder was swapped, and one that is restored to.
        try_it([
            Path::new("restore"),
            Path::new("--yes"),
            &scene.image,
            &own.join("new"),
        ]);
        swapper.stop();
        assert_eq!(listing(&victim), names, "round {n}");
        assert_eq!(std::fs::read(victim.join("image")).unwrap(), b"precious");
        let _ = std::fs::remove_file(own.join("new"));
    }
}

/// A link that belongs to the user who calls, or to root, is followed as ever.
#[test]
fn links_of_the_caller_are_followed() {
    let scene = Scene::new();
    let target = scene.target(SIZE);
    let [link, image, out] = ["link", "image-link", "out"].map(|name| scene.path(name));
    symlink(&target, &link).unwrap();
    run(scene.restore_to(&link)).expect(0);
    assert!(link.is_symlink());
    std::fs::write(&out, "old").unwrap();
    symlink("out", &image).unwrap();
    let args = ["backup", "--force", "-o"].map(Path::new).into_iter();
    run(args.chain([image.as_path(), &scene.source])).expect(0);
    assert!(image.is_symlink());
    run([Path::new("verify"), &out]).expect(0);
}

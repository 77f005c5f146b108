//! What a command line means: which source, and which step makes it hold still.

use std::fmt;
use std::fs::File;
use std::path::Path;

use holdstill_platform::beneath;
use holdstill_platform::device::Geometry;
use holdstill_platform::extents_below::Extents;
use holdstill_platform::guard::Undo;
use holdstill_platform::node::Node;
use serde::Serialize;

use crate::destination::apart::refuse_shared;
use crate::error::{Error, Kind, Result};
use crate::freeze::step::{self, AnyStep};
use crate::freeze::{Context, CowRoom, Still, Turn};
use crate::source::{Medium, Source};

/// A source and the step chosen for it.
#[derive(Debug)]
pub struct Plan {
    /// The source.
    pub source: Source,
    /// The other devices of its filesystem, where they are imaged with it.
    pub siblings: Vec<Source>,
    /// How it will hold still.
    pub step: AnyStep,
    /// Steps that come earlier in the ladder, and why they do not apply.
    pub passed_over: Vec<(AnyStep, String)>,
    /// The step was named: no other is taken.
    is_named: bool,
}

impl Plan {
    /// Finds the first step that applies to the source `text`, or checks that the named one does.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if the named step, or every step, does not apply; what
    /// [`Source::resolve`] says.
    pub fn make(text: &str, named: Option<AnyStep>) -> Result<Self> {
        Self::of(Source::resolve(text)?, named)
    }

    /// The same for a source that was found.
    ///
    /// # Errors
    /// As [`make`](Self::make).
    pub fn of(source: Source, named: Option<AnyStep>) -> Result<Self> {
        let candidates: Vec<AnyStep> = match named {
            Some(step) => vec![step],
            None => step::ladder(),
        };
        let mut passed_over = Vec::new();
        let found = first_of(candidates, &source, &mut passed_over)?;
        let Some((step, siblings)) = found else {
            return Err(nothing_applies(&source, named, &passed_over));
        };
        Ok(Self {
            source,
            siblings,
            step,
            passed_over,
            is_named: named.is_some(),
        })
    }

    /// Makes the source hold still. Where `auto` chose a step that could not make its snapshot and has left
    /// nothing behind, the next that applies is tried, and this is its plan then. Returns what the user
    /// should know of that.
    ///
    /// # Errors
    /// What the last step says.
    pub fn hold_still_somehow(
        &mut self,
        context: &Context<'_>,
    ) -> Result<(Box<dyn Still>, Vec<String>)> {
        self.try_steps(
            |plan| plan.hold_still(context),
            |next| next.allow_freeze(context.no_freeze).is_ok(),
        )
    }

    /// Begins with `begin`; where that could not make its snapshot and nothing is left of it, with the next
    /// step that applies and that `may` allows.
    ///
    /// # Errors
    /// What the last step says.
    pub fn try_steps<T>(
        &mut self,
        mut begin: impl FnMut(&Self) -> Result<T>,
        may: impl Fn(&Self) -> bool,
    ) -> Result<(T, Vec<String>)> {
        let mut warnings = Vec::new();
        loop {
            let error = match begin(self) {
                Ok(begun) => return Ok((begun, warnings)),
                Err(error) => error,
            };
            let next = match !self.is_named && error.is_undone() {
                true => self.next(&error)?,
                false => None,
            };
            let Some(next) = next.filter(&may) else {
                return Err(error);
            };
            warnings.push(format!(
                "`{}` could not make a snapshot, so `{}` is taken: {error}",
                self.step, next.step
            ));
            *self = next;
        }
    }

    /// The plan by the first step that applies and comes later in the ladder, if there is one for the same
    /// devices.
    fn next(&self, error: &Error) -> Result<Option<Self>> {
        let ladder = step::ladder().into_iter();
        let later = ladder.skip_while(|step| *step != self.step).skip(1);
        let mut passed_over = self.passed_over.clone();
        passed_over.push((self.step, error.to_string()));
        let found = first_of(later.collect(), &self.source, &mut passed_over)?;
        let found = found.filter(|(_, siblings)| siblings.len() == self.siblings.len());
        Ok(found.map(|(step, siblings)| Self {
            source: self.source.clone(),
            siblings,
            step,
            passed_over,
            is_named: false,
        }))
    }

    /// Refuses a step that makes writers wait, where none may.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`].
    pub fn allow_freeze(&self, no_freeze: bool) -> Result<()> {
        match no_freeze && self.step.has_to_freeze() {
            true => Err(Error::new(
                Kind::NotApplicable,
                format!(
                    "`{}` makes writers wait, and --no-freeze forbids it",
                    self.step
                ),
            )
            .on(&self.source.path)),
            false => Ok(()),
        }
    }

    /// Refuses an output that lies on a source which will be frozen: whoever writes it would wait for the thaw,
    /// and the thaw for that. `output` need not exist yet.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`]; if /proc or /sys cannot be read.
    pub fn refuse_output_on_source(&self, output: &Path, no_freeze: bool) -> Result<()> {
        let is_frozen = self.step.freezes(&self.source, no_freeze);
        // Only what can be opened without waiting for anybody; of others the step itself judges.
        let place = match std::fs::metadata(output) {
            Ok(metadata) if metadata.is_file() => output,
            Ok(_) => return Ok(()),
            Err(_) => match output.parent() {
                Some(parent) if parent != Path::new("") => parent,
                _ => Path::new("."),
            },
        };
        let Ok(place) = File::open(place) else {
            return Ok(());
        };
        for source in self.sources() {
            if let Medium::Device(device) = &source.medium
                && is_frozen
                && beneath::file_rests_on(&place, device)?
            {
                let what = format!(
                    "`{}` does not apply: the output lies on the source itself",
                    self.step
                );
                return Err(Error::new(Kind::NotApplicable, what)
                    .on(&source.path)
                    .hint("write elsewhere, or to a pipe that does"));
            }
        }
        Ok(())
    }

    /// Makes the source hold still, with one volume for each of [`sources`](Self::sources).
    ///
    /// # Errors
    /// What the step says.
    pub fn hold_still(&self, context: &Context<'_>) -> Result<Box<dyn Still>> {
        let sources: Vec<&Source> = self.sources().collect();
        self.step.begin(&sources, context)
    }

    /// The source, and what is imaged with it.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        std::iter::once(&self.source).chain(&self.siblings)
    }

    /// What a guard may have to undo should run `run_id` die.
    ///
    /// # Errors
    /// If the tools for that are missing.
    pub fn undo(&self, run_id: &str) -> Result<Vec<Undo>> {
        self.step.undo(&self.source, run_id)
    }

    /// Whether this is the source itself, by another name perhaps, or imaged with it.
    pub fn includes(&self, other: &Source) -> bool {
        let Ok(node) = Node::of(&other.path) else {
            return false;
        };
        self.sources().any(|source| source.is_same_as(&node))
    }

    /// Size and sectors of each of its [`sources`](Self::sources); at most, where it is copied by way of
    /// another device.
    ///
    /// # Errors
    /// If one cannot be opened.
    pub fn geometries(&self) -> Result<Vec<Geometry>> {
        let geometry = |source| self.step.geometry(source);
        self.sources().map(geometry).collect()
    }

    /// The bytes of its [`sources`](Self::sources), wherever they lie.
    ///
    /// # Errors
    /// If the kernel does not say what a source is built of.
    pub fn extents(&self) -> Result<Extents> {
        let mut all = Extents::default();
        for source in self.sources() {
            all.extend(match &source.medium {
                Medium::Device(device) => Extents::of_device(device.number)?,
                Medium::File(file) => Extents::of_file(*file, &source.path)?,
            });
        }
        Ok(all)
    }

    /// Refuses to keep what is overwritten on a device that has bytes of a source, or of what is `written`.
    ///
    /// # Errors
    /// [`Kind::InUse`].
    pub fn refuse_cow_device(&self, cow: &CowRoom, written: &Extents) -> Result<()> {
        // With `lvm` it is a physical volume, which may well be the one that the source is on.
        let Some(path) = cow.device.as_ref().filter(|_| self.step == step::DM) else {
            return Ok(());
        };
        let device = Extents::of_node(&Node::of(path)?)?;
        refuse_shared(
            "--cow-device",
            path,
            &device,
            "the source",
            &self.extents()?,
        )?;
        refuse_shared("--cow-device", path, &device, "what is written", written)
    }
}

/// Refuses to hold a filesystem frozen for its copy together with one that lies on it: neither could be frozen
/// after the other, nor thawed before it, in an order that is right for both.
///
/// # Errors
/// [`Kind::NotApplicable`].
pub fn refuse_nested_holds(plans: &[Plan]) -> Result<()> {
    let held = plans
        .iter()
        .filter(|plan| plan.step.turn(false) == Turn::Held);
    let held: Vec<_> = held
        .filter_map(|plan| match &plan.source.medium {
            Medium::Device(device) => Some((plan, device)),
            Medium::File(_) => None,
        })
        .collect();
    for (upper, above) in &held {
        for (lower, device) in &held {
            if above.number != device.number && beneath::rests_on(above.number, device)? {
                let what = format!(
                    "it lies on {}, and both would be held frozen for their copies",
                    lower.source.path.display()
                );
                return Err(Error::new(Kind::NotApplicable, what)
                    .on(&upper.source.path)
                    .hint("--freeze track, or an image of each"));
            }
        }
    }
    Ok(())
}

/// The first step that applies, and what is imaged with the source by it.
fn first_of(
    candidates: Vec<AnyStep>,
    source: &Source,
    passed_over: &mut Vec<(AnyStep, String)>,
) -> Result<Option<(AnyStep, Vec<Source>)>> {
    for step in candidates {
        match siblings_or_objection(step, source)? {
            Ok(siblings) => return Ok(Some((step, siblings))),
            Err(why) => passed_over.push((step, why)),
        }
    }
    Ok(None)
}

/// One step of the ladder, and whether it applies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StepReport {
    /// The step.
    pub step: String,
    /// Why it does not apply; absent if it does.
    pub objection: Option<String>,
}

/// All steps that `auto` tries, and what speaks against each.
///
/// # Errors
/// If the source cannot be examined.
pub fn ladder(source: &Source) -> Result<Vec<StepReport>> {
    let reports = step::ladder().into_iter().map(|step| {
        Ok(StepReport {
            step: step.name().to_owned(),
            objection: siblings_or_objection(step, source)?.err(),
        })
    });
    reports.collect()
}

/// What is imaged with a source by a step; or what speaks against that step, for the source or for
/// one of those.
fn siblings_or_objection(
    step: AnyStep,
    source: &Source,
) -> Result<std::result::Result<Vec<Source>, String>> {
    if source.subvolume.is_some() && step != step::BTRFS {
        return Ok(Err("it images no single subvolume".to_owned()));
    }
    if let Some(why) = step.objection(source)? {
        return Ok(Err(why));
    }
    let siblings = step.siblings(source)?;
    if step == step::BTRFS {
        // Of a mounted filesystem, whatever speaks against one of its devices does so of all.
        return Ok(Ok(siblings));
    }
    for sibling in &siblings {
        if let Some(why) = step.objection(sibling)? {
            return Ok(Err(format!("{}: {why}", sibling.path.display())));
        }
    }
    Ok(Ok(siblings))
}

fn nothing_applies(
    source: &Source,
    named: Option<AnyStep>,
    passed_over: &[(AnyStep, String)],
) -> Error {
    let reasons: Vec<String> = passed_over
        .iter()
        .map(|(step, why)| format!("{step}: {why}"))
        .collect();
    let message = match named {
        Some(step) => format!("`{step}` does not apply ({})", reasons.join("; ")),
        None => format!("nothing can make it hold still ({})", reasons.join("; ")),
    };
    Error::new(Kind::NotApplicable, message)
        .on(&source.path)
        .hint("unmount it, or end whatever writes to it")
}

/// One line for people.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source.path.display())?;
        for sibling in &self.siblings {
            write!(f, ", {}", sibling.path.display())?;
        }
        if let Some(subvolume) = &self.source.subvolume {
            write!(f, ", of it only the subvolume {}", subvolume.path)?;
        }
        write!(f, ": {}", self.step)?;
        for (step, why) in &self.passed_over {
            write!(f, "; not {step}, because {why}")?;
        }
        Ok(())
    }
}

//! `hold`: the filesystem stays frozen for the whole copy. For small volumes that can do without
//! writers for a while (`/boot`), and only when asked for: everybody who writes to it waits.

use std::sync::Arc;
use std::time::Duration;

use holdstill_platform::device::{Access, Disk};
use holdstill_platform::trace;

use super::freezer::{Expect, Freezer};
use super::ice::Ice;
use super::mounted;
use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::freeze::step::{Rung, Step};
use crate::freeze::survey::{Mode, Survey};
use crate::freeze::{Context, Next, OnePass, Pass, Proof, Still, Turn, only};
use crate::progress::{Event, Progress};
use crate::source::Source;

/// The longest a filesystem is held frozen. At this moment the guard thaws it, and the run fails.
pub const LIMIT: Duration = Duration::from_secs(60);

/// `hold`: frozen for the whole copy.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "hold"
    }

    fn about(&self) -> &'static str {
        "frozen for the whole copy, 60 s at most; never chosen by auto"
    }

    fn when(&self) -> &'static str {
        "only when named: a small volume such as `/boot`"
    }

    fn how(&self) -> &'static str {
        "frozen for the whole copy, 60 seconds at most"
    }

    fn rung(&self) -> Rung {
        Rung::Named
    }

    fn turn(&self, _: bool) -> Turn {
        Turn::Held
    }

    fn freezes(&self, _: &Source, _: bool) -> bool {
        true
    }

    fn objection(&self, source: &Source) -> Result<Option<String>> {
        objection(source)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Hold::freeze(only(sources)?, context)?))
    }
}

/// A source held frozen.
#[derive(Debug)]
pub struct Hold {
    source: Source,
    disk: Disk,
    survey: Survey,
    // Dropped first of what matters: fields are dropped in order, and the thaw must not wait.
    frozen: Option<Ice>,
    freezer: Arc<Freezer>,
    instant: jiff::Timestamp,
    passes: OnePass,
    run: Session,
}

/// Why the source cannot be held frozen; `None` if nothing speaks against it.
///
/// # Errors
/// If it cannot be examined.
fn objection(source: &Source) -> Result<Option<String>> {
    let device = match mounted::device(source) {
        Ok(device) => device,
        Err(why) => return Ok(Some(why)),
    };
    if mounted::has_swap(device)? {
        return Ok(Some("swap space lies on it".to_owned()));
    }
    if !trace::may_be_counted(device)? {
        return Ok(Some(
            "the kernel does not count what is written to it (queue/iostats is off), so nothing would \
             prove that the freeze held"
                .to_owned(),
        ));
    }
    mounted::other_writer(device)
}

impl Hold {
    /// Freezes the source. What the copy is written to must not lie on it.
    ///
    /// # Errors
    /// [`Kind::NotApplicable`] if the copy would wait for itself; else if it cannot be frozen or read.
    pub fn freeze(source: &Source, context: &Context<'_>) -> Result<Self> {
        let Context {
            run,
            output,
            all_blocks,
            progress,
            ..
        } = *context;
        let no = |why: String| {
            Error::new(
                Kind::NotApplicable,
                format!("it cannot be held frozen: {why}"),
            )
            .on(&source.path)
        };
        let device = mounted::device(source).map_err(no)?;
        if let Some(why) = mounted::would_wait_for_itself(device, output)? {
            return Err(
                no(why.to_owned()).hint("write the image elsewhere, or to a pipe that does")
            );
        }
        let disk = Disk::open(&source.path, Access::Read)?;
        let freezer = Arc::new(Freezer::open(source, run)?);
        if let Some(why) = freezer.blind_spot() {
            return Err(no(why.to_owned()));
        }
        run.before_freeze(progress)?;
        freezer.sync(progress)?;
        let mut frozen = freezer.freeze(LIMIT, progress)?;
        let instant = jiff::Timestamp::now();
        frozen.settle();
        let mode = Mode::of(source.mount.as_ref());
        let survey = Survey::of_frozen(&disk, mode, all_blocks)?;
        progress.event(&Event::Frozen {
            instant: &instant.to_string(),
        });
        Ok(Self {
            source: source.clone(),
            disk,
            survey,
            frozen: Some(frozen),
            freezer,
            instant,
            passes: OnePass::new(context.compare),
            run: run.clone(),
        })
    }

    fn too_long(&self) -> Error {
        Error::new(
            Kind::Inconsistent,
            format!(
                "the copy takes longer than the {} s a filesystem may be held frozen",
                LIMIT.as_secs()
            ),
        )
        .on(&self.source.path)
        .hint("--freeze auto, if that can image it, or unmount it")
    }
}

impl Still for Hold {
    fn surveys(&self) -> &[Survey] {
        std::slice::from_ref(&self.survey)
    }

    fn next(&mut self, _: &dyn Progress) -> Result<Next<'_>> {
        let Some(purpose) = self.passes.next() else {
            return Ok(Next::Over);
        };
        let this = &*self;
        Ok(Next::Pass(Pass {
            volume: 0,
            source: &this.disk,
            walk: Box::new(move |sink| {
                this.survey.walk(&this.disk, &mut |run| {
                    // After the deadline the guard has thawed: every further byte is for nothing.
                    if this
                        .frozen
                        .as_ref()
                        .is_none_or(|frozen| frozen.held() >= LIMIT)
                    {
                        return Err(this.too_long());
                    }
                    sink(run)
                })
            }),
            purpose,
        }))
    }

    fn finish(mut self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        let missing = || Error::new(Kind::Failed, "thawed twice");
        let frozen = self.frozen.take().ok_or_else(missing)?;
        let read_ms = mounted::milliseconds(frozen.held());
        let thawed = frozen.thaw(Expect::Nothing, progress);
        self.run.after_thaw(progress);
        let thawed = thawed?;
        self.freezer.nobody_wrote_below()?;
        let times = mounted::times("final", &thawed, 0.0, read_ms);
        progress.event(&Event::Thawed(&times));
        Ok(Proof {
            grade: self.survey.grade,
            instant: self.instant,
            freezes: vec![times],
            commit: None,
        })
    }
}

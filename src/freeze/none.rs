//! `none`: nothing makes the source hold still. Only with the user's word that an inconsistent copy
//! will do, where every other step refuses: to save what can be saved. The copy is torn for ever.

use holdstill_platform::device::{Access, Disk};

use crate::error::{Error, Kind, Result};
use crate::freeze::session::Session;
use crate::freeze::step::{Rung, Step};
use crate::freeze::survey::Survey;
use crate::freeze::{Context, Next, OnePass, Proof, Still, Turn, only};
use crate::image::manifest::Grade;
use crate::progress::Progress;
use crate::source::Source;

/// A source that may change while it is read.
#[derive(Debug)]
pub struct Moving {
    disk: Disk,
    survey: Survey,
    instant: jiff::Timestamp,
    passes: OnePass,
    /// The run, if its hooks stand around this copy.
    hooks: Option<Session>,
}

/// `none`: nothing holds still.
#[derive(Debug)]
pub struct Method;

impl Step for Method {
    fn name(&self) -> &'static str {
        "none"
    }

    fn about(&self) -> &'static str {
        "not at all, see --allow-inconsistent; never chosen by auto"
    }

    fn when(&self) -> &'static str {
        "only when named, with `--allow-inconsistent`"
    }

    fn how(&self) -> &'static str {
        "not at all: to save what can be saved where every other step refuses"
    }

    fn rung(&self) -> Rung {
        Rung::Named
    }

    fn turn(&self, _: bool) -> Turn {
        Turn::Unused
    }

    fn has_to_freeze(&self) -> bool {
        false
    }

    fn objection(&self, _: &Source) -> Result<Option<String>> {
        Ok(None)
    }

    fn begin(&self, sources: &[&Source], context: &Context<'_>) -> Result<Box<dyn Still>> {
        Ok(Box::new(Moving::open(only(sources)?, context)?))
    }
}

impl Moving {
    /// Opens a source, whoever uses it.
    ///
    /// # Errors
    /// If it cannot be read; [`Kind::NotApplicable`] if the copy is to be compared with it.
    pub fn open(source: &Source, context: &Context<'_>) -> Result<Self> {
        if context.compare {
            let why = "a source that moves cannot be compared with its copy";
            return Err(Error::new(Kind::NotApplicable, why)
                .on(&source.path)
                .hint("leave out --verify"));
        }
        if context.hooks_around_copy {
            context.run.before_freeze(context.progress)?;
        }
        let disk = Disk::open(&source.path, Access::Read)?;
        Ok(Self {
            survey: Survey::of_moving(&disk)?,
            disk,
            instant: jiff::Timestamp::now(),
            passes: OnePass::new(false),
            hooks: context.hooks_around_copy.then(|| context.run.clone()),
        })
    }
}

impl Still for Moving {
    fn surveys(&self) -> &[Survey] {
        std::slice::from_ref(&self.survey)
    }

    fn next(&mut self, _: &dyn Progress) -> Result<Next<'_>> {
        Ok(self.passes.over(&self.disk, &self.survey).into())
    }

    fn finish(self: Box<Self>, progress: &dyn Progress) -> Result<Proof> {
        if let Some(run) = &self.hooks {
            run.after_thaw(progress);
        }
        Ok(Proof {
            grade: Grade::Torn,
            instant: self.instant,
            freezes: Vec::new(),
            commit: None,
        })
    }
}

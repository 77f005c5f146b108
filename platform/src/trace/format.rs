//! What the running kernel says about the layout of its trace: `events/header_page`,
//! `events/header_event` and `events/block/block_rq_complete/format` of tracefs. Text only, no I/O.
//!
//! Nothing is taken for granted: fields move between kernel versions, and a field that is missing
//! or of another size is refused.

use std::ops::Range;

/// Where a field lies in its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Field {
    offset: usize,
    size: usize,
}

impl Field {
    fn range(self) -> Range<usize> {
        // Both were read from at most five digits.
        self.offset..self.offset + self.size
    }
}

/// Layout of a page of the ring buffer, as `trace_pipe_raw` hands it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PageFormat {
    /// Length of the data and flags about lost events.
    pub(super) commit: Range<usize>,
    /// The events.
    pub(super) data: Range<usize>,
}

impl PageFormat {
    /// Reads `header_page`, and checks in `header_event` that events are headed as we know it.
    pub(super) fn parse(header_page: &str, header_event: &str) -> Option<Self> {
        let commit = field(header_page, "commit")?;
        let data = field(header_page, "data")?;
        let expected = [
            ("type_len", "5 bits"),
            ("time_delta", "27 bits"),
            ("array", "32 bits"),
            ("padding", "type == 29"),
            ("time_extend", "type == 30"),
            ("time_stamp", "type == 31"),
        ];
        let says = |name: &str, what: &str| {
            header_event.lines().any(|line| {
                line.split_once(':')
                    .is_some_and(|(key, value)| key.trim() == name && value.trim() == what)
            })
        };
        let known = expected.iter().all(|(name, what)| says(name, what))
            && header_event.contains("data max type_len  == 28");
        let sane = matches!(commit.size, 4 | 8) && commit.range().end <= data.offset;
        let data_fits = (64..=1 << 20).contains(&data.size);
        (known && sane && data_fits).then(|| Self {
            commit: commit.range(),
            data: data.range(),
        })
    }

    /// Size of a whole page, in bytes.
    pub(super) fn page_len(&self) -> usize {
        self.data.end
    }
}

/// Layout of the event `block_rq_complete`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EventFormat {
    /// Which event a record is: its first field.
    pub(super) id: u16,
    pub(super) common_type: Range<usize>,
    pub(super) dev: Range<usize>,
    pub(super) sector: Range<usize>,
    pub(super) nr_sector: Range<usize>,
    pub(super) rwbs: Range<usize>,
}

impl EventFormat {
    /// Reads the file `format`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let name = text.lines().find_map(|line| line.strip_prefix("name:"))?;
        let id = text.lines().find_map(|line| line.strip_prefix("ID:"))?;
        let sized = |name, size| field(text, name).filter(|field| field.size == size);
        let rwbs = field(text, "rwbs").filter(|field| (2..=64).contains(&field.size))?;
        (name.trim() == "block_rq_complete").then_some(())?;
        Some(Self {
            id: id.trim().parse().ok()?,
            common_type: sized("common_type", 2)?.range(),
            dev: sized("dev", 4)?.range(),
            sector: sized("sector", 8)?.range(),
            nr_sector: sized("nr_sector", 4)?.range(),
            rwbs: rwbs.range(),
        })
    }
}

/// Finds a field by name in lines such as
/// `field:char rwbs[10]; offset:34; size:10; signed:0;` (with tabs between).
fn field(text: &str, name: &str) -> Option<Field> {
    text.lines().find_map(|line| {
        let mut parts = line.trim().split(';').map(str::trim);
        let declaration = parts.next()?.strip_prefix("field:")?.trim();
        let declared = declaration.split_whitespace().next_back()?;
        let declared = declared.split('[').next()?;
        (declared == name).then_some(())?;
        let mut number = |key: &str| -> Option<usize> {
            let value: u32 = parts.next()?.strip_prefix(key)?.parse().ok()?;
            (value < 1 << 21).then_some(())?;
            usize::try_from(value).ok()
        };
        Some(Field {
            offset: number("offset:")?,
            size: number("size:")?,
        })
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const HEADER_PAGE: &str = "\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
";

    pub(crate) const HEADER_EVENT: &str = "\
# compressed entry header
\ttype_len    :    5 bits
\ttime_delta  :   27 bits
\tarray       :   32 bits

\tpadding     : type == 29
\ttime_extend : type == 30
\ttime_stamp : type == 31
\tdata max type_len  == 28
";

    /// Linux 6.18.
    pub(crate) const FORMAT: &str = "\
name: block_rq_complete
ID: 2107
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:dev_t dev;\toffset:8;\tsize:4;\tsigned:0;
\tfield:sector_t sector;\toffset:16;\tsize:8;\tsigned:0;
\tfield:unsigned int nr_sector;\toffset:24;\tsize:4;\tsigned:0;
\tfield:int error;\toffset:28;\tsize:4;\tsigned:1;
\tfield:unsigned short ioprio;\toffset:32;\tsize:2;\tsigned:0;
\tfield:char rwbs[10];\toffset:34;\tsize:10;\tsigned:0;
\tfield:__data_loc char[] cmd;\toffset:44;\tsize:4;\tsigned:0;

print fmt: \"%d,%d %s (%s) %llu + %u %s,%u,%u [%d]\", REC->rwbs
";

    #[test]
    fn what_this_kernel_says_is_understood() {
        let page = PageFormat::parse(HEADER_PAGE, HEADER_EVENT).unwrap();
        assert_eq!((page.commit.clone(), page.data.clone()), (8..16, 16..4096));
        assert_eq!(page.page_len(), 4096);
        let event = EventFormat::parse(FORMAT).unwrap();
        assert_eq!(event.id, 2107);
        assert_eq!((event.sector, event.rwbs), (16..24, 34..44));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let refused = |from: &str, to: &str| {
            assert!(FORMAT.contains(from));
            assert_eq!(EventFormat::parse(&FORMAT.replace(from, to)), None, "{to}");
        };
        refused(
            "sector_t sector;\toffset:16;\tsize:8",
            "sector_t sector;\toffset:16;\tsize:4",
        );
        refused("nr_sector", "nr_bytes");
        refused("dev_t dev;", "dev_t device;");
        refused("size:10", "size:1");
        refused("offset:34", "offset:99999999");
        refused("ID: 2107", "ID: 99999");
        refused("block_rq_complete", "block_rq_issue");
        assert_eq!(EventFormat::parse(""), None);
        for (from, to) in [
            ("5 bits", "6 bits"),
            ("type == 29", "type == 28"),
            ("== 28", "== 27"),
        ] {
            let changed = HEADER_EVENT.replace(from, to);
            assert_eq!(PageFormat::parse(HEADER_PAGE, &changed), None, "{to}");
        }
        for (from, to) in [
            ("offset:16", "offset:12"),
            ("size:4080", "size:40"),
            ("commit", "x"),
        ] {
            let changed = HEADER_PAGE.replace(from, to);
            assert_eq!(PageFormat::parse(&changed, HEADER_EVENT), None, "{to}");
        }
    }
}

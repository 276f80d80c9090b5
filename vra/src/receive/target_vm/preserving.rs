//! Views that are in the way of a promotion that the journal needs for room: they are kept by copying (C5), or they end.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use journal::format::{Footer, Gap};
use journal::recovery::{Segment, SurveyOptions, each_footer, survey};
use journal::storage::ring::{Access, DirectFile};
use journal::storage::{Blocking, Purpose};
use journal::view::ViewError;

use super::{TargetVm, locks};
use crate::api::status::Severity;
use crate::receive::error_chain;
use crate::receive::files;
use crate::receive::target_error::TargetError;
use crate::view::{Below, PreserveError, ViewDisk};

/// Between two looks, while more may have to make way.
const LOOK_WAIT: Duration = Duration::from_millis(100);
/// Between two tries, while a view can't be kept and may not end.
const RETRY_WAIT: Duration = Duration::from_secs(2);
/// How long a view is waited for that can't be kept for a reason that may pass, such as a hiccup of the datastore.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) const EXPIRED: &str = "view-expired";
pub(super) const IN_THE_WAY: &str = "view-in-the-way";

/// A view that is in the way.
pub(super) struct InTheWay {
    pub(super) pin: u64,
    /// What it shows.
    pub(super) seq: u64,
    /// Everything up to here may be promoted already.
    pub(super) kept_seq: u64,
    /// It is a locked checkpoint with overlays.
    pub(super) is_lock: bool,
    /// It was open before the files were, and its disks are not served again yet.
    pub(super) is_awaited: bool,
    /// Its disks, if they are served.
    pub(super) disks: Vec<Arc<ViewDisk>>,
}

impl TargetVm {
    /// The journal needs promotion through this number for room, and open views show what is before it; or none is in the way any more.
    pub(super) fn view_in_the_way(self: Arc<Self>, through_seq: Option<u64>) {
        let mut inner = self.lock();
        inner.wanted_way = through_seq;
        if through_seq.is_none() {
            inner.alerts.remove(IN_THE_WAY);
            inner.alerts.remove(locks::IN_THE_WAY);
        }
        if through_seq.is_some() && !std::mem::replace(&mut inner.is_making_way, true) {
            drop(inner);
            self.runtime.clone().spawn(self.make_way());
        }
    }

    async fn make_way(self: Arc<Self>) {
        loop {
            let wanted = {
                let mut inner = self.lock();
                if inner.wanted_way.is_none() || inner.closed || inner.key.is_none() {
                    inner.not_kept_since.clear();
                    inner.is_making_way = false;
                    return;
                }
                inner.wanted_way
            };
            let vm = self.clone();
            let made = self.runtime.spawn_blocking(move || wanted.map(|wanted| vm.keep_views(wanted)));
            let wait = match made.await {
                Ok(Some(Ok(Way::Made))) => LOOK_WAIT,
                Ok(Some(Err(error))) => {
                    tracing::warn!(vm = %self.vm, error = error_chain(&error), "open views can't be kept yet");
                    RETRY_WAIT
                }
                _ => RETRY_WAIT,
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// Copies what a promotion through this number is about to change beneath open views.
    fn keep_views(self: &Arc<Self>, through_seq: u64) -> Result<Way, TargetError> {
        let views = self.lock().pins.in_the_way(through_seq);
        let (served, unserved): (Vec<_>, Vec<_>) = views.into_iter().partition(|view| !view.disks.is_empty());
        let mut way = Way::Made;
        // Others are about to be opened, or to be closed.
        for view in unserved.into_iter().filter(|view| view.is_awaited) {
            way = way.and(self.may_end_view(&view, &PreserveError::NotServed));
        }
        if served.is_empty() {
            return Ok(way);
        }
        let changes = self.changes(&served, through_seq)?;
        for view in served {
            let kept = view.disks.iter().try_for_each(|disk| {
                let below = self.below(disk.number())?;
                let after_seq = view.kept_seq.max(view.seq);
                self.keep(&changes, disk, after_seq, through_seq, below).map_err(KeepError::View)
            });
            match kept {
                Ok(()) => {
                    tracing::info!(vm = %self.vm, seq = view.seq, through_seq, "kept an open view by copying what promotion will change");
                    self.view_kept(view.pin, through_seq);
                }
                Err(KeepError::Files(error)) => return Err(error),
                Err(KeepError::View(error)) => way = way.and(self.may_end_view(&view, &error)),
            }
        }
        Ok(way)
    }

    /// What the records write that promotion through this number is about to carry, as far as these views don't have it.
    fn changes(&self, views: &[InTheWay], through_seq: u64) -> Result<Vec<Footer>, TargetError> {
        let after_seq = views.iter().map(|view| view.kept_seq.max(view.seq)).min().unwrap_or_default();
        let mut storage = files::ring()?;
        let file = storage.add_file(DirectFile::open(&self.folder.journal(), Access::ReadOnly)?);
        let options = SurveyOptions { keys: self.keys.site(), ..SurveyOptions::default() };
        let survey =
            survey(&mut storage, file, &options).map_err(|source| TargetError::View(source.into()))?;
        if survey.tail.seq < through_seq || survey.damage.is_some() {
            let (oldest_seq, newest_seq) = (survey.superblock.oldest_seq(), survey.tail.seq);
            return Err(TargetError::View(ViewError::Gone { seq: through_seq, oldest_seq, newest_seq }));
        }
        // Nothing is promoted meanwhile: the views are in the way.
        let is_concerned =
            |segment: &&Segment| segment.last().seq > after_seq && segment.header.after.seq < through_seq;
        let segments: Vec<Segment> = survey.segments.iter().filter(is_concerned).cloned().collect();
        let mut footers = Vec::with_capacity(segments.len());
        let mut io = Blocking::new(&mut storage, file, Purpose::View);
        each_footer(&segments, &mut io, &survey.superblock, |footer| footers.push(footer))
            .map_err(|source| TargetError::View(source.into()))?;
        let is_lost =
            |gap: &Gap| gap.has_records() && gap.last_seq > after_seq && gap.first_seq <= through_seq;
        if footers.iter().flat_map(|footer| &footer.gaps).any(is_lost) {
            // It isn't known what is to be copied, and the promotion can't be carried out either: nothing makes way for it.
            return Err(TargetError::View(ViewError::InsideSync { seq: through_seq }));
        }
        Ok(footers)
    }

    fn below(&self, volume: u16) -> Result<Below, KeepError> {
        let open = |path| DirectFile::open(path, Access::ReadOnly).map_err(TargetError::from);
        let (journal, disk) = (open(&self.folder.journal())?, open(&self.folder.disk(volume))?);
        let below = Below::new(journal, &disk);
        below.map_err(|source| KeepError::Files(files::host("reading beneath a view", source)))
    }

    fn keep(
        &self,
        changes: &[Footer],
        disk: &Arc<ViewDisk>,
        after_seq: u64,
        through_seq: u64,
        mut below: Below,
    ) -> Result<(), PreserveError> {
        let ranges = changed(changes, disk.number(), after_seq, through_seq);
        disk.preserve(through_seq, &ranges, &mut below)
    }

    fn view_kept(&self, pin: u64, through_seq: u64) {
        let mut inner = self.lock();
        inner.pins.keep(pin, through_seq);
        inner.not_kept_since.remove(&pin);
        self.tell_pins(&inner, None);
    }

    fn view_ended(&self, view: &InTheWay) {
        view.disks.iter().for_each(|disk| disk.set_gone());
        let mut inner = self.lock();
        inner.pins.end(view.pin);
        inner.not_kept_since.remove(&view.pin);
        self.tell_pins(&inner, None);
    }

    /// A view can't be kept now: it ends, if that can't change by itself or has lasted.
    fn may_end_view(self: &Arc<Self>, view: &InTheWay, error: &PreserveError) -> Way {
        let since = *self.lock().not_kept_since.entry(view.pin).or_insert_with(Instant::now);
        if error.may_pass() && since.elapsed() < PATIENCE {
            tracing::warn!(vm = %self.vm, seq = view.seq, error = error_chain(error), "an open view can't be kept yet");
            return Way::Blocked;
        }
        if self.end_view(view, error) { Way::Made } else { Way::Blocked }
    }

    /// A view that can't be kept ends, if replication is worth more than it, as for locks; else replication waits for somebody to close it.
    /// False if it does.
    fn end_view(self: &Arc<Self>, view: &InTheWay, error: &PreserveError) -> bool {
        if view.is_lock {
            if !self.lock_not_kept(view.seq, &error_chain(error)) {
                return false;
            }
            let (vm, cut) = (Arc::clone(self), view.seq);
            // Its end is durable before anything is promoted past it.
            if let Err(error) = self.runtime.block_on(vm.release(move |locked| locked.cut == cut)) {
                tracing::warn!(vm = %self.vm, cut, error = error_chain(&error), "a lock was not given up");
                return false;
            }
            // Views on top of it end too.
            self.view_ended(view);
            return true;
        }
        let gives_up = self.definition().give_up_history;
        let what = format!(
            "a view of the VM at record {} stands in the way of the journal {}, which has no room, and can't be kept: {}",
            view.seq,
            self.folder.journal().display(),
            error_chain(error)
        );
        if !gives_up {
            let remedy = "close the view, or raise the VM's journal limit: until then replication pauses";
            self.alert(IN_THE_WAY, Severity::Critical, what, remedy);
            return false;
        }
        self.view_ended(view);
        self.lock().alerts.remove(EXPIRED);
        let remedy = "the view reads errors now: close it. A view with more scratch, or a larger journal, would have lasted";
        self.alert(EXPIRED, Severity::Critical, format!("{what}; it was given up"), remedy);
        true
    }
}

/// Whether views are out of the way.
#[derive(Clone, Copy)]
enum Way {
    /// Those that could be.
    Made,
    /// One can't be kept, and may not end yet.
    Blocked,
}

impl Way {
    fn and(self, other: Self) -> Self {
        if matches!(self, Self::Made) { other } else { self }
    }
}

enum KeepError {
    /// Nothing is known of the view.
    Files(TargetError),
    View(PreserveError),
}

impl From<TargetError> for KeepError {
    fn from(error: TargetError) -> Self {
        Self::Files(error)
    }
}

/// What of a volume the records after `after_seq` and up to `through_seq` write: disjoint, in order.
fn changed(footers: &[Footer], volume: u16, after_seq: u64, through_seq: u64) -> Vec<Range<u64>> {
    let mut gaps = footers.iter().flat_map(|footer| &footer.gaps);
    if gaps.any(|gap| gap.has_records() && gap.last_seq > after_seq && gap.first_seq <= through_seq) {
        // It is promoted only with a sync of the whole disk that came later; and should the disk give the records back by then, with those.
        let all = 0..u64::MAX;
        return vec![all];
    }
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for footer in footers {
        for extent in footer.extents_of(volume) {
            let seq = footer.base_seq + u64::from(extent.seq_delta.get());
            if seq > after_seq && seq <= through_seq {
                let begin = extent.offset_bytes.get();
                ranges.push(begin..begin + extent.len_bytes());
            }
        }
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

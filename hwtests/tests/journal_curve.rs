//! The journal's file follows its load, within its limit. `HOLDFAST_PLOT=FILE.svg` draws it.

use anyhow::Result;
use hwtests::journal_curve::{CurveSettings, Sample, Stretch, run, to_svg};

const SETTINGS: CurveSettings = CurveSettings { history_s: 60, slot_len_bytes: 8 << 20, max_slots: 16 };
const QUIET_BYTES_PER_S: u64 = 128 << 10;

const LOAD: [Stretch; 5] = [
    Stretch { name: "quiet", seconds: 90, bytes_per_s: QUIET_BYTES_PER_S },
    Stretch { name: "burst", seconds: 30, bytes_per_s: 20 * QUIET_BYTES_PER_S },
    Stretch { name: "quiet again", seconds: 180, bytes_per_s: QUIET_BYTES_PER_S },
    Stretch { name: "more than fits", seconds: 60, bytes_per_s: 40 * QUIET_BYTES_PER_S },
    Stretch { name: "nothing", seconds: 180, bytes_per_s: 0 },
];

#[test]
fn the_file_follows_its_load_and_never_passes_its_limit() -> Result<()> {
    let samples = run(&SETTINGS, &LOAD)?;
    if let Some(path) = std::env::var_os("HOLDFAST_PLOT") {
        std::fs::write(path, to_svg(&SETTINGS, &samples))?;
    }
    let ends: Vec<usize> = LOAD
        .iter()
        .scan(0, |end, stretch| {
            *end += stretch.seconds as usize;
            Some(*end)
        })
        .collect();
    let [quiet, burst, again, more, nothing] = ends[..] else { unreachable!("five stretches") };
    let most = |samples: &[Sample]| samples.iter().map(|sample| sample.occupied_bytes).max().unwrap_or(0);
    // What the filesystem needs to know where the file is counts as the file's blocks, too.
    let limit_bytes = SETTINGS.limit_bytes() + (64 << 10);
    assert!(most(&samples) <= limit_bytes, "{} bytes", most(&samples));
    let slots = |bytes: u64| bytes / SETTINGS.slot_len_bytes;
    // A minute of the quiet load is one or two slots; beside them are the one being filled and those that are kept free.
    let before = samples[quiet - 1].occupied_bytes;
    for at in [quiet, again] {
        let count = slots(samples[at - 1].occupied_bytes);
        assert!(count <= 6, "{count} slots for a quiet load after {at} s");
    }
    assert!(most(&samples[quiet..burst]) >= before + 4 * SETTINGS.slot_len_bytes, "it grew with the burst");
    assert_eq!(
        samples[burst - 1].history_s,
        SETTINGS.history_s.max(samples[burst - 1].history_s),
        "all of it stayed"
    );
    assert!(
        samples[more - 1].history_s < SETTINGS.history_s / 2,
        "history was shortened, not the limit passed"
    );
    assert!(slots(samples[nothing - 1].occupied_bytes) <= 5, "nothing is kept for a load that isn't there");
    // While everything fits history is as long as it should be, and not much longer: a slot is given up as a whole.
    for sample in &samples[70..again] {
        assert!(sample.history_s >= SETTINGS.history_s, "{sample:?}");
    }
    Ok(())
}

//! A curve as a picture.

use std::fmt::Write as _;

use super::{CurveSettings, Sample};

const WIDTH: f64 = 860.0;
const PANEL: f64 = 150.0;
const LEFT: f64 = 70.0;

/// Load, file and history over time, one above the other, as SVG.
pub fn to_svg(settings: &CurveSettings, samples: &[Sample]) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let limit_mib = mib(settings.limit_bytes());
    let panels: [(&str, Vec<f64>, Option<f64>); 3] = [
        ("written, MiB/s", samples.iter().map(|sample| mib(sample.written_bytes)).collect(), None),
        (
            "journal file, MiB",
            samples.iter().map(|sample| mib(sample.occupied_bytes)).collect(),
            Some(limit_mib),
        ),
        (
            "history, s",
            samples.iter().map(|sample| sample.history_s as f64).collect(),
            Some(settings.history_s as f64),
        ),
    ];
    let height = PANEL * panels.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let count = samples.len().max(2) as f64;
    let x = |index: usize| LEFT + (WIDTH - LEFT - 20.0) * index as f64 / (count - 1.0);
    for (number, (name, values, line)) in panels.iter().enumerate() {
        let top = number as f64 * PANEL + 24.0;
        let bottom = top + PANEL - 40.0;
        let most = values.iter().copied().chain(*line).fold(1e-9, f64::max);
        let y = |value: f64| bottom - (bottom - top) * value / most;
        // Writing to a string doesn't fail.
        let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{name}</text>", top - 8.0);
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{}\">{most:.0}</text><text x=\"8\" y=\"{bottom}\">0</text>",
            top + 4.0
        );
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {top}V{bottom}H{}\" fill=\"none\" stroke=\"#888\"/>",
            WIDTH - 20.0
        );
        if let Some(line) = line {
            let at = y(*line);
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{}\" stroke=\"#c33\" stroke-dasharray=\"4\"/>",
                WIDTH - 20.0
            );
        }
        let points =
            values.iter().enumerate().map(|(index, value)| format!("{:.1},{:.1}", x(index), y(*value)));
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"#06c\" stroke-width=\"1.5\"/>"
        );
    }
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"{}\">0 s</text>", height - 8.0);
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\">{} s</text>\n</svg>",
        WIDTH - 70.0,
        height - 8.0,
        samples.len()
    );
    svg
}

//! Tables and JSON.

use serde_json::json;
use ublk::device::DeviceInfo;
use ublk::features::Features;

/// Prints one device a line.
pub(crate) fn devices(devices: &[DeviceInfo], as_json: bool) {
    if as_json {
        for info in devices {
            println!("{}", device_json(info));
        }
        return;
    }
    println!(
        "{:>4} {:<9} {:>8} {:>10} {:>16} {:>6} {:>5} {:>7}",
        "id", "state", "pid", "disk", "bytes", "queues", "depth", "io-kib"
    );
    for info in devices {
        let pid = info.daemon_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let disk = info.cookie.map_or_else(|| "stranger".to_owned(), |cookie| cookie.disk_id.to_string());
        println!(
            "{:>4} {:<9} {:>8} {:>10} {:>16} {:>6} {:>5} {:>7}",
            info.id,
            info.state.to_string(),
            pid,
            disk,
            info.size_bytes,
            info.queues,
            info.depth,
            info.io_bytes_max / 1024
        );
    }
}

/// Prints a driver's features.
pub(crate) fn features(features: Features, as_json: bool) {
    if as_json {
        println!("{}", json!({ "bits": format!("{:#x}", features.0), "names": features.names() }));
    } else {
        println!("{:#x}", features.0);
        for name in features.names() {
            println!("{name}");
        }
    }
}

fn device_json(info: &DeviceInfo) -> serde_json::Value {
    json!({
        "id": info.id,
        "state": info.state.to_string(),
        "daemon_pid": info.daemon_pid,
        "disk_id": info.cookie.map(|cookie| cookie.disk_id),
        "size_bytes": info.size_bytes,
        "queues": info.queues,
        "depth": info.depth,
        "io_bytes_max": info.io_bytes_max,
        "features": info.features.names(),
    })
}

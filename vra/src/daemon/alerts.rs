//! What is wrong now, since when.

use std::collections::BTreeMap;

use crate::api::{Alert, Severity, TimeUs, VmId, VpgId};

/// One thing found wrong at a look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// As [`Alert::code`].
    pub code: &'static str,
    /// How bad.
    pub severity: Severity,
    /// The VM, if it is about one.
    pub vm: Option<VmId>,
    /// The VPG, if it is about one.
    pub vpg: Option<VpgId>,
    /// For people.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
}

/// The alerts in force. One stays for as long as each look finds it.
#[derive(Debug, Default)]
pub struct AlertBook {
    alerts: BTreeMap<Key, Alert>,
}

type Key = (&'static str, Option<VmId>, Option<VpgId>);

impl AlertBook {
    /// Takes all that one look found: new things are raised, things no longer found are cleared. Returns both, for the log.
    pub fn look(&mut self, found: Vec<Finding>, now: TimeUs) -> (Vec<Alert>, Vec<Alert>) {
        let mut next = BTreeMap::new();
        let mut raised = Vec::new();
        for finding in found {
            let key = (finding.code, finding.vm, finding.vpg);
            let since_us = self.alerts.get(&key).map_or(now, |alert| alert.since_us);
            let alert = Alert {
                code: finding.code.to_owned(),
                severity: finding.severity,
                vm: finding.vm,
                vpg: finding.vpg,
                message: finding.message,
                remedy: finding.remedy,
                since_us,
            };
            if !self.alerts.contains_key(&key) && !next.contains_key(&key) {
                raised.push(alert.clone());
            }
            next.insert(key, alert);
        }
        let former = std::mem::replace(&mut self.alerts, next);
        let cleared = former.into_iter().filter(|(key, _)| !self.alerts.contains_key(key));
        (raised, cleared.map(|(_, alert)| alert).collect())
    }

    /// All in force, the worst first.
    pub fn list(&self) -> Vec<Alert> {
        let mut alerts: Vec<_> = self.alerts.values().cloned().collect();
        alerts.sort_by_key(|alert| (std::cmp::Reverse(alert.severity), alert.since_us));
        alerts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(code: &'static str, vm: Option<VmId>) -> Finding {
        Finding { code, severity: Severity::Warning, vm, vpg: None, message: "m".to_owned(), remedy: None }
    }

    #[test]
    fn an_alert_is_raised_once_keeps_its_time_and_is_cleared_once() {
        let mut book = AlertBook::default();
        let vm = Some(VmId::random());
        let (raised, cleared) = book.look(vec![finding("a", None), finding("a", vm)], TimeUs(10));
        assert_eq!((raised.len(), cleared.len()), (2, 0));
        let (raised, cleared) = book.look(vec![finding("a", vm)], TimeUs(20));
        assert_eq!((raised.len(), cleared.len()), (0, 1));
        assert_eq!(book.list()[0].since_us, TimeUs(10));
        let (_, cleared) = book.look(vec![], TimeUs(30));
        assert_eq!(cleared[0].vm, vm);
        assert!(book.list().is_empty());
    }
}

"""A log of the kind people bring: written by hand and by a script, its UTF-8 taken for a code page on the way.

The same damage as in logs in the wild: marks of two to four characters, a variation selector and other bytes that
the code page has no character for lost for good, two heading emoji collapsed to the same rest.
"""

from __future__ import annotations

from compat.reports.marks import garbled

WHOLE = """\
# Modifications Log

## 📋 Table of Contents
- [Testing](#testing)

## ✅ Testing

### Test Run #1 - Baseline (2025-10-02)
- **Date**: 2025-10-02
- **Status**: ⏳ Pending
- **Results**:
  - Model Loading: ⏳ Not yet tested
  - Generation: ⏳ Not yet tested
- **Notes**: before any change

## 📝 Detailed Test Results

naïve words stay, and so does 日本

## 📞 Contact

## 🔍 Search and Code Review

## ⚠️ Known Issues
- `✅ in a code span` is somebody's example

```text
- ✅ in fenced code
```
---

### Integration Test Run - 2025-10-02 09:10:11
- **Device**: cuda
- **PyTorch**: 2.8.0+cu128
- **Status**: ⚠️ 1/3 Passed

**Test Results**:
- ✅ Config Compatibility
- ❌ Generate Method
  - Error: `RuntimeError: shape '[2, 3]'
---
is invalid`
- ❌ Backward Pass

---

### Integration Test Run - 2025-10-02 10:00:00
- **Device**: cuda
- **PyTorch**: 2.8.0+cu128
- **Status**: ✅ All Passed

**Test Results**:
- ✅ Config Compatibility
- ✅ Generate Method
- ✅ Backward Pass
"""
LEFT = ("naïve words stay, and so does 日本", "- `✅ in a code span` is somebody's example", "- ✅ in fenced code")


def damaged(page: str = "cp1254", lost: str = "") -> str:
    """WHOLE with every mark and heading emoji garbled; ordinary words of other scripts as they are."""
    lines = []
    for line in WHOLE.split("\n"):
        keep = line == LEFT[0]
        lines.append(line if keep else "".join(c if c.isascii() else garbled(c, page, lost) for c in line))
    return "\n".join(lines)

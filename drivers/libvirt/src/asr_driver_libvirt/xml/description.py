"""Descriptions as they are kept with a recovery point: neutral values and libvirt's own artifacts."""

from __future__ import annotations

from collections.abc import Mapping

from lxml import etree

from asr_driver_libvirt.xml.domain import METADATA_URI, DomainModel, machine_of, parse_xml
from asrcore.model.machine import Artifact, Description, PowerState

__all__ = ["DOMAIN_XML", "NVRAM", "PLATFORM", "describe", "without_our_metadata"]

PLATFORM = "libvirt"
DOMAIN_XML = "domain.xml"
"""Artifact: the definition that boots exactly what was protected, passwords included."""
NVRAM = "nvram"
"""Artifact: the UEFI variable store, byte by byte."""


def describe(
    model: DomainModel, xml: str, sizes: Mapping[str, int], power: PowerState, nvram: bytes | None
) -> Description:
    """`xml`: the definition to be kept, without what the driver itself put into it."""
    artifacts = [Artifact(DOMAIN_XML, without_our_metadata(xml).encode())]
    if nvram is not None:
        artifacts.append(Artifact(NVRAM, nvram))
    return Description(machine_of(model, sizes, power), PLATFORM, tuple(artifacts))


def without_our_metadata(xml: str) -> str:
    """The same definition without a fence or another record of the driver: a replica is not fenced because its source
    was."""
    root = parse_xml(xml)
    metadata = root.find("metadata")
    if metadata is not None:
        for element in list(metadata):
            if isinstance(element.tag, str) and (etree.QName(element).namespace or "").startswith(METADATA_URI):
                metadata.remove(element)
        if len(metadata) == 0:
            root.remove(metadata)
    return etree.tostring(root, encoding="unicode")

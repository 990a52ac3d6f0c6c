// A DICOM segmentation as OHIF reads it: by cornerstone's adapters, beside the images that it was made from.
//
//     node read.mjs IMAGES SEGMENTATION reference|position
//
// IMAGES is a folder with the files of one series. What is printed is JSON: for each segment's number its label, and the
// places of its voxels' centres in the patient (LPS, mm), by the images' own planes as cornerstone's metadata has them.
//
// The adapters look for each frame's image by the reference in the frame, and else by its position. Here they get one of
// the two: images that do not say where they lie, or images that do not say which they are.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

import { adaptersSEG } from '@cornerstonejs/adapters';
import { metaData } from '@cornerstonejs/core';
import { registerDefaultProviders, utilities } from '@cornerstonejs/metadata';

const [images, segmentation, way] = process.argv.slice(2);

function contentOf(path) {
  const { buffer, byteOffset, byteLength } = readFileSync(path);
  return buffer.slice(byteOffset, byteOffset + byteLength);
}

// One id for each frame, as OHIF makes them for files: frames are counted from 1.
async function register(folder) {
  const ids = [];
  for (const name of readdirSync(folder).sort()) {
    const idOf = (frame) => `dicomfile:${name}?frame=${frame}`;
    await utilities.addDicomPart10Instance(idOf(1), contentOf(join(folder, name)));
    const frames = Number(metaData.get('instance', idOf(1)).NumberOfFrames ?? 1);
    for (let frame = 1; frame <= frames; frame += 1) {
      ids.push(idOf(frame));
    }
  }
  return ids;
}

const metadataProvider = {
  get(type, id) {
    const found = metaData.get(type, id);
    if (way === 'reference' && type === 'generalImageModule') {
      return { ...found, sopInstanceUID: metaData.get('instance', id).SOPInstanceUID };
    }
    if (way === 'reference' && type === 'instance' && found !== undefined) {
      return Object.create(found, { ImagePositionPatient: { value: undefined } });
    }
    return found;
  },
};

// PS3.3, C.7.6.2.1.1
function placeOf(pixel, plane) {
  const row = Math.floor(pixel / plane.columns);
  const column = pixel % plane.columns;
  return plane.imagePositionPatient.map(
    (origin, axis) =>
      origin +
      plane.rowCosines[axis] * plane.columnPixelSpacing * column +
      plane.columnCosines[axis] * plane.rowPixelSpacing * row,
  );
}

registerDefaultProviders();
const ids = await register(images);
const found = await adaptersSEG.Cornerstone3D.Segmentation.createFromDICOMSegBuffer(ids, contentOf(segmentation), {
  metadataProvider,
});

const segments = {};
for (const { SegmentNumber, SegmentLabel } of found.segMetadata.data.filter(Boolean)) {
  segments[SegmentNumber] = { label: SegmentLabel, places: [] };
}
for (const layer of found.labelMapImages) {
  layer.forEach((image, slice) => {
    const plane = metaData.get('imagePlaneModule', ids[slice]);
    image.getPixelData().forEach((number, pixel) => {
      if (number !== 0) {
        segments[number].places.push(placeOf(pixel, plane));
      }
    });
  });
}
console.log(JSON.stringify({ overlapping: found.overlappingSegments, segments }));

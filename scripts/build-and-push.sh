#!/usr/bin/env bash
# Builds the images of this commit, API and worker, with Cloud Build or with the docker of this machine, and pushes them. What is
# not committed is not in them. An image whose tag is there already is not built again.
#   scripts/build-and-push.sh [--dry-run] [--local]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "--local" "$@"

# Of the commit, so that no file of this folder (such as .env) leaves it by mistake, and the same commit gives the same images.
pack_source() {
  REVISION=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null) ||
    fail "This folder is not a clone of the repository, and images are built from a commit."
  CREATED=$(git -C "$ROOT" log -1 --format=%cI)
  [ -z "$(git -C "$ROOT" status --porcelain)" ] || note "What is not committed will not be in the images."
  git -C "$ROOT" archive --format=tar.gz --output="$SCRATCH/source.tar.gz" HEAD
}

build_in_cloud() {
  local words=(builds submit "$SCRATCH/source.tar.gz" --config="$ROOT/scripts/deploy/cloudbuild.yaml"
    --substitutions="_IMAGES=${IMAGES%/},_TAG=$TAG,_REVISION=$REVISION,_CREATED=$CREATED")
  [ -z "$BUILD_SERVICE_ACCOUNT" ] ||
    words+=(--service-account="projects/$PROJECT_ID/serviceAccounts/$BUILD_SERVICE_ACCOUNT")
  say "Cloud Build builds both images: some minutes."
  change "${words[@]}"
}

build_here() {
  local part image
  command -v docker >/dev/null || fail "There is no docker here: leave out --local, so that Cloud Build builds."
  change auth configure-docker "$REGION-docker.pkg.dev"
  for part in api worker; do
    image=$(image_name "$part"):$TAG
    say "Building $image"
    here docker build --platform=linux/amd64 --file="containers/$part.Dockerfile" --tag="$image" \
      --build-arg=VERSION="$TAG" --build-arg=REVISION="$REVISION" --build-arg=CREATED="$CREATED" -
    here docker push "$image"
  done
}

here() {
  if dry_run; then
    would_run "$@"
  else
    "$@" <"$SCRATCH/source.tar.gz" || fail "$1 $2 failed; what it said is above."
  fi
}

show_images() {
  local part image
  for part in api worker; do
    find_image image "$part" "$TAG" || fail "The image $part:$TAG is still not there: look at what the build said."
    say "$image"
  done
}

TAG=$(image_tag)
IMAGES=$(image_name "")
look repository artifacts repositories describe "$ARTIFACT_REPOSITORY" --location="$REGION" --format='value(format)' ||
  missing "The repository $ARTIFACT_REPOSITORY" setup-project.sh
if ! dry_run && find_image api_image api "$TAG" && find_image worker_image worker "$TAG"; then
  say "The images are there already."
else
  pack_source
  if option --local; then
    build_here
  else
    build_in_cloud
  fi
fi
show_images
finish

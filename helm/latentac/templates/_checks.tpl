{{/*
What must hold before anything is installed: every problem at once, each with its remedy. Whether a cluster can be asked
is seen by an API that each has and that plain `helm template` does not know.
*/}}
{{- define "latentac.checks" -}}
{{- $problems := concat (include "latentac.checks.names" . | fromJsonArray) (include "latentac.checks.policy" . | fromJsonArray)
      (include "latentac.checks.store" . | fromJsonArray) (include "latentac.checks.cluster" . | fromJsonArray) -}}
{{- if $problems }}
{{- fail (printf "\n\nlatentac cannot be installed like this:\n- %s\n" (join "\n- " $problems)) }}
{{- end }}
{{- end }}

{{- define "latentac.checks.names" -}}
{{- $problems := list -}}
{{- if or (gt (len .Release.Name) 40) (contains "." .Release.Name) -}}
{{- $problems = append $problems (printf "the release's name %q: at most 40 characters and no dot, for names are made of it. Choose another one" .Release.Name) -}}
{{- end -}}
{{- $longest := printf "%s-green-predictor-%s" .Values.serving.name .Release.Namespace -}}
{{- if and .Values.serving.enabled (gt (len $longest) 63) -}}
{{- $problems = append $problems (printf "serving.name: KServe makes the name %q of it, which has %d of at most 63 characters. Choose a shorter serving.name or namespace" $longest (len $longest)) -}}
{{- end -}}
{{- if gt (int .Values.train.replicas.min) (int .Values.train.replicas.max) -}}
{{- $problems = append $problems (printf "train.replicas: min %d is more than max %d. Correct one of them" (int .Values.train.replicas.min) (int .Values.train.replicas.max)) -}}
{{- end -}}
{{- if and .Values.train.queue.create (eq .Values.train.queue.name "default") -}}
{{- $problems = append $problems "train.queue.create: the queue \"default\" belongs to Volcano. Give train.queue.name another name, or leave create off" -}}
{{- end -}}
{{- if and (not .Values.pipeline.serviceAccount.create) (not .Values.pipeline.serviceAccount.name) -}}
{{- $problems = append $problems "pipeline.serviceAccount.name: it is empty and create is off. Name the account that the steps run under (KFP standalone: pipeline-runner)" -}}
{{- end -}}
{{ $problems | toJson }}
{{- end }}

{{- define "latentac.checks.policy" -}}
{{- $problems := list -}}
{{- with .Values.imagePolicy -}}
{{- if .enabled -}}
{{- if and .publicKey (or .keyless.issuer .keyless.subject) -}}
{{- $problems = append $problems "imagePolicy.publicKey, imagePolicy.keyless: both are given. Leave one of them out" -}}
{{- end -}}
{{- if not (or .publicKey (and .keyless.issuer .keyless.subject)) -}}
{{- $problems = append $problems "imagePolicy.publicKey: nobody is named who must have signed. Give it, or imagePolicy.keyless.issuer and .subject (build/images/values.yaml of the release has them)" -}}
{{- end -}}
{{- if and (not .publicKey) (not .transparencyLog) -}}
{{- $problems = append $problems "imagePolicy.transparencyLog: a signature without a key is proved by the log alone. Leave it on" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ $problems | toJson }}
{{- end }}

{{- define "latentac.checks.store" -}}
{{- $problems := list -}}
{{- with .Values.store -}}
{{- if $.Values.minio.enabled -}}
{{- if .endpoint -}}
{{- $problems = append $problems "store.endpoint: it is given, and minio.enabled brings an endpoint of its own. Leave one of them out" -}}
{{- end -}}
{{- if and .secretKey (lt (len .secretKey) 8) -}}
{{- $problems = append $problems "store.secretKey: MinIO wants at least 8 characters. Give a longer one, or none: then one is made" -}}
{{- end -}}
{{- else -}}
{{- if or (not .url) (not .endpoint) -}}
{{- $problems = append $problems "store.url, store.endpoint: an S3 store is needed, as s3://<bucket>/<prefix> and https://<host>. Give both, or set minio.enabled=true for an evaluation" -}}
{{- end -}}
{{- if not (or .existingSecret (and .accessKey .secretKey)) -}}
{{- $problems = append $problems "store.existingSecret: credentials are needed. Name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give store.accessKey and store.secretKey in a values file" -}}
{{- end -}}
{{- end -}}
{{- if and .existingSecret (or .accessKey .secretKey) -}}
{{- $problems = append $problems "store.existingSecret: it is named, and store.accessKey or store.secretKey is given as well. Leave one of them out" -}}
{{- end -}}
{{- if ne (empty .accessKey) (empty .secretKey) -}}
{{- $problems = append $problems "store.accessKey, store.secretKey: only one of them is given. Give both" -}}
{{- end -}}
{{- end -}}
{{ $problems | toJson }}
{{- end }}

{{/* Each: what, its API, which values do without it, where it comes from. */}}
{{- define "latentac.checks.cluster" -}}
{{- $problems := list -}}
{{- $check := .Values.prerequisites.check -}}
{{- if or (eq $check "always") (and (eq $check "auto") (.Capabilities.APIVersions.Has "apiregistration.k8s.io/v1")) -}}
{{- $needed := list
      (list "Volcano" "batch.volcano.sh/v1alpha1" "train has no other way to run")
      (list "Kubeflow Pipelines (its Argo Workflows)" "argoproj.io/v1alpha1" "the steps have no other way to run") -}}
{{- if and .Values.serving.enabled (ne (toString .Values.serving.enabled) "auto") -}}
{{- range list "serving.kserve.io/v1beta1" "serving.kserve.io/v1alpha1" -}}
{{- $needed = append $needed (list "KServe" . "serving.enabled=false does without an endpoint") -}}
{{- end -}}
{{- end -}}
{{- if .Values.serving.gateway -}}
{{- $needed = append $needed (list "Gateway API" "gateway.networking.k8s.io/v1" "serving.gateway=null does without") -}}
{{- end -}}
{{- if .Values.imagePolicy.enabled -}}
{{- $needed = append $needed (list "Kyverno" "policies.kyverno.io/v1/NamespacedImageValidatingPolicy" "imagePolicy.enabled=false does without") -}}
{{- end -}}
{{- range $needed -}}
{{- if not ($.Capabilities.APIVersions.Has (index . 1)) -}}
{{- $problems = append $problems (printf "%s: the cluster has no API %s. Install it (README.md, prerequisites); %s. prerequisites.check=never installs all the same" (index . 0) (index . 1) (index . 2)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{ $problems | toJson }}
{{- end }}

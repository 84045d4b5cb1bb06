{{/* Namespace in which Kubeflow Pipelines runs the steps. */}}
{{- define "latentac.stepsNamespace" -}}
{{ default .Release.Namespace .Values.pipeline.namespace }}
{{- end }}

{{/* The namespaces that hold settings and credentials, as JSON: the release's, and the steps' if it is another. */}}
{{- define "latentac.namespaces" -}}
{{ list .Release.Namespace (include "latentac.stepsNamespace" .) | uniq | toJson }}
{{- end }}

{{- define "latentac.pipelineAccount" -}}
{{ default (printf "%s-pipeline" .Release.Name) .Values.pipeline.serviceAccount.name }}
{{- end }}

{{/* What selects pods, of one component or of all. Arguments: component. */}}
{{- define "latentac.selector" -}}
app.kubernetes.io/part-of: latentac
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* Selects the pods of this release alone. Arguments: root, component. */}}
{{- define "latentac.ownSelector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{ include "latentac.selector" . }}
{{- end }}

{{/* Labels of an object of the chart. Arguments: root, component. */}}
{{- define "latentac.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: latentac
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "latentac.ownSelector" . }}
{{- end }}

{{/* name, namespace and labels. Arguments: root, component, name (after the release's), namespace (default: its own). */}}
{{- define "latentac.metadata" -}}
name: {{ .root.Release.Name }}{{ with .name }}-{{ . }}{{ end }}
namespace: {{ default .root.Release.Namespace .namespace }}
labels:
  {{- include "latentac.labels" . | nindent 2 }}
{{- end }}

{{/* Name of an image without tag and digest. Arguments: root, name (a key of images). */}}
{{- define "latentac.imageName" -}}
{{- $image := index .root.Values.images .name -}}
{{- with default $image.registry .root.Values.global.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ $image.repository }}
{{- end }}

{{/* Reference of an image. Arguments: root, name (a key of images). */}}
{{- define "latentac.image" -}}
{{- $image := index .root.Values.images .name -}}
{{ include "latentac.imageName" . }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{/* Whether something is on (a non-empty answer). Arguments: root, wanted (true, false, "auto"), api. */}}
{{- define "latentac.enabled" -}}
{{- if eq (toString .wanted) "auto" }}
{{- if .root.Capabilities.APIVersions.Has .api }}yes{{ end }}
{{- else if .wanted }}yes{{ end }}
{{- end }}

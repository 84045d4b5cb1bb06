{{/*
The rights of the account that the steps run under: exactly the calls that the code makes, as a test on a real API
server holds against its audit log. Correct them here when the code's calls change.
*/}}

{{/* In the release's namespace: where jobs, endpoint and their pods are. */}}
{{- define "latentac.rights.release" -}}
- {apiGroups: [batch.volcano.sh], resources: [jobs], verbs: [create, get, list, delete]}
- {apiGroups: [batch.volcano.sh], resources: [jobs/status], verbs: [get, update]}
- {apiGroups: [""], resources: [pods], verbs: [get, list]}
- {apiGroups: [""], resources: [pods/log], verbs: [get]}
- {apiGroups: [""], resources: [events], verbs: [list]}
{{- if .Values.serving.enabled }}
- {apiGroups: [serving.kserve.io], resources: [inferenceservices], verbs: [get, create, patch, delete]}
- {apiGroups: [serving.kserve.io], resources: [servingruntimes], verbs: [get, create, patch]}
- {apiGroups: [apps], resources: [deployments], verbs: [get]}
{{- if .Values.serving.gateway }}
- {apiGroups: [gateway.networking.k8s.io], resources: [httproutes], verbs: [get, create, patch]}
{{- end }}
{{- end }}
{{- end }}

{{/* In the steps' namespace: what Kubeflow Pipelines and Argo do from within a step's pod. */}}
{{- define "latentac.rights.steps" -}}
- {apiGroups: [argoproj.io], resources: [workflowtaskresults], verbs: [create, patch]}
{{- $secrets := .Values.pipeline.artifactSecrets }}
{{- if .Values.pipeline.launcherConfig.enabled }}{{ $secrets = append $secrets (include "latentac.storeSecret" .) | uniq }}{{ end }}
- {apiGroups: [""], resources: [pods], verbs: [get]}
- {apiGroups: [""], resources: [configmaps], resourceNames: [kfp-launcher], verbs: [get]}
{{- with $secrets }}
- {apiGroups: [""], resources: [secrets], resourceNames: {{ toJson . }}, verbs: [get]}
{{- end }}
{{- end }}

--- The steps of moonrabbit doctor from the URL up to the protocol, without a login. Each gets the patient, and returns
-- true when the next one makes sense.

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local ms = require("moonrabbit.cli.doctor.report").ms
local uri = require "moonrabbit.uri"

local steps = {}

function steps.uri(report, patient, args)
  local options, parsed, source = patient.options, patient.parsed, patient.source
  if not options then options, parsed, source = credentials.resolve(args) end
  if not options then
    return report:fail("URL", exit.usage, parsed, "amqp[s]://user:password@host:port/vhost, with percent-encoding")
  end
  patient.options, patient.parsed = options, parsed
  patient.timeout = args.timeout or 5
  local text = uri.redacted(parsed)
  if parsed.srv then return steps.srv(report, patient, text) end
  return report:pass("URL", ("%s (from %s)"):format(text, source), {
    url = text, source = source, user = parsed.user, vhost = parsed.vhost, tls = parsed.tls ~= nil,
  })
end

-- The first host of a service stands for it.
function steps.srv(report, patient, text)
  local found, problem = require("moonrabbit.cluster.resolver").srv(require "moonrabbit.runtime.native",
    patient.parsed.srv, { timeout = patient.timeout })
  if not found then
    return report:fail("URL", exit.unreachable, ("%s: %s"):format(text, problem),
      "is the name of the service right, and do the name servers of /etc/resolv.conf know it?")
  end
  patient.parsed = require("moonrabbit.cluster.targets").at(patient.parsed, found[1].host, found[1].port)
  return report:pass("URL", ("%s: %d hosts, the first is %s"):format(text, #found, uri.endpoint(patient.parsed)), {
    url = text, hosts = found, user = patient.parsed.user, vhost = patient.parsed.vhost,
  })
end

function steps.dns(report, patient)
  local parsed = patient.parsed
  if parsed.path then
    patient.addresses = { require "moonrabbit.net".unix(parsed.path) }
    return report:pass("DNS", "not needed: a unix socket")
  end
  local probe = require "moonrabbit.cli.probe"
  local began = connect.now()
  local addresses, text = probe.resolve(parsed.host, parsed.port, patient.timeout)
  if not addresses then
    return report:fail("DNS", exit.unreachable, parsed.host .. ": " .. text,
      "is the host name right, and does this machine reach its name server?")
  end
  patient.addresses = addresses
  local names = {}
  for i, address in ipairs(addresses) do names[i] = tostring(address) end
  return report:pass("DNS", ("%s is %s (%s)"):format(parsed.host, table.concat(names, ", "),
    ms(connect.now() - began)), { addresses = names })
end

local tcp_advice = {
  refused = "nothing listens there: is the broker running, and is this its port (5672, 5671 with TLS)?",
  timeout = "packets vanish: a firewall, or the wrong host?",
}

function steps.tcp(report, patient)
  local probe = require "moonrabbit.cli.probe"
  local texts, data, worst = {}, {}, nil
  for i, address in ipairs(patient.addresses) do
    local stream, kind, text = probe.connect(address, nil, nil, patient.timeout)
    if stream then
      stream:close()
      patient.address = patient.address or address
      texts[i] = ("%s in %s"):format(tostring(address), ms(kind))
      data[i] = { address = tostring(address), seconds = kind }
    else
      worst = worst or kind
      text = text or kind
      texts[i] = text:find(tostring(address), 1, true) and text or tostring(address) .. ": " .. text
      data[i] = { address = tostring(address), error = text }
    end
  end
  local text = table.concat(texts, "; ")
  if not patient.address then
    return report:fail("TCP", exit.unreachable, text, tcp_advice[worst], { addresses = data })
  end
  return report:pass("TCP", text, { addresses = data })
end

local function context(tls, verify)
  return require "moonrabbit.net".tls {
    ca = tls.ca, cert = tls.cert, key = tls.key, verify = verify, min_version = tls.min_version,
  }
end

-- How long a second look at the port may take: it only tells what else may be there.
local function patience(patient) return math.min(2, patient.timeout) end

-- Opens the port once more, with or without an unverified TLS.
local function again(patient)
  local probe = require "moonrabbit.cli.probe"
  return function(with_tls)
    local ctx = with_tls and context(patient.parsed.tls or {}, false) or nil
    return (probe.connect(patient.address, ctx, patient.parsed.host, patience(patient)))
  end
end

local function tls_advice(patient, text)
  local lower = text:lower()
  if lower:find("host name mismatch", 1, true) then
    return "connect by a name that the certificate is for, or give that name with --server-name"
  elseif lower:find("expired", 1, true) then
    return "the certificate has expired: the broker needs a new one (or this machine's clock is wrong)"
  elseif lower:find("verify failed", 1, true) then
    return "trust the authority that signed it with --ca FILE (in a URL: ?cacertfile=FILE)"
  elseif lower:find("peer refused", 1, true) then
    return "the broker wants a client certificate that it trusts: --cert FILE --key FILE"
  end
  local kind = require "moonrabbit.cli.probe".plain(again(patient), patience(patient))
  if kind == "amqp" then
    return "this port speaks plain AMQP: use amqp://, or the broker's TLS port (usually 5671)"
  elseif kind == "http" then
    return "this is an HTTP port: AMQP over TLS is usually on 5671"
  end
  return "is this the broker's TLS port (usually 5671)?"
end

function steps.tls(report, patient)
  local tls = patient.parsed.tls
  if not tls then return report:pass("TLS", "not used (amqps:// does)", { used = false }) end
  local probe = require "moonrabbit.cli.probe"
  local verify = tls.verify ~= false
  local ctx, problem = context(tls, verify)
  if not ctx then
    return report:fail("TLS", exit.usage, problem, "check the files given with --ca, --cert and --key")
  end
  local name = tls.server_name or patient.parsed.host
  local stream, kind, text = probe.connect(patient.address, ctx, name, patient.timeout)
  if not stream then
    text = text or kind
    return report:fail("TLS", exit.unreachable, text, tls_advice(patient, text))
  end
  patient.context = ctx
  local about = stream:tls_info() or ""
  stream:close()
  return report:pass("TLS", ("%s, %s, in %s"):format(about ~= "" and about or "up",
    verify and "certificate and name verified" or "NOTHING VERIFIED", ms(kind)),
    { used = true, verified = verify, session = about })
end

local protocol_failures = {
  http = { "an HTTP server answers on this port", "AMQP is usually on 5672 (15672 is the management plugin's HTTP)" },
  tls = { "this port speaks TLS", "use amqps:// in the URL, or the broker's plain port (usually 5672)" },
  silent = { "the port says nothing", "something accepts connections there, but it is no AMQP broker (or it hangs)" },
  closed = { "the connection was closed without a word", "no AMQP broker, or a proxy without one behind it" },
}

function steps.protocol(report, patient)
  local probe = require "moonrabbit.cli.probe"
  local stream, kind, text = probe.connect(patient.address, patient.context,
    patient.parsed.tls and (patient.parsed.tls.server_name or patient.parsed.host), patient.timeout)
  if not stream then return report:fail("protocol", exit.unreachable, text or kind) end
  local found, about = probe.protocol(stream, patient.timeout, again(patient))
  stream:close()
  if found == "amqp" then
    patient.start = about
    local properties = about.properties or {}
    return report:pass("protocol", ("AMQP 0-9-1, %s %s, logins by %s"):format(tostring(properties.product or "?"),
      tostring(properties.version or "?"), tostring(about.mechanisms or "?")), { mechanisms = about.mechanisms })
  end
  local failure = protocol_failures[found]
  if failure then return report:fail("protocol", exit.unreachable, failure[1], failure[2]) end
  if found == "amqp_version" then
    return report:fail("protocol", exit.unreachable, "the port speaks AMQP " .. about .. ", not 0-9-1",
      "for AMQP 0-9-1 RabbitMQ listens on 5672")
  end
  return report:fail("protocol", exit.unreachable, "the port answers something else: " .. tostring(about),
    "AMQP is usually on 5672")
end

return steps

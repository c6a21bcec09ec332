--- moonrabbit doctor: connects step by step and says what is wrong where.

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local doctor_cluster = require "moonrabbit.cli.doctor_cluster"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"
local uri = require "moonrabbit.uri"

local doctor = {
  summary = "Connect step by step, and say what is wrong where and what to do.",
  epilog = "Looks at the URL, DNS, TCP, TLS, the protocol, the login, the vhost, permissions (with a temporary "
    .. "exclusive queue), versions and the round trip; with --cluster at the other nodes too. Changes nothing on the "
    .. "broker.",
}

function doctor.build(command, common)
  command:option "--rounds" :argname "<n>" :default "11" :description "How many round trips are timed."
    :convert(require "moonrabbit.cli.values".integer(1, 10000))
  doctor_cluster.build(command)
  common(command)
end

-- ---- The report -------------------------------------------------------------------------------------

local Report = {}
Report.__index = Report

local function new_report() return setmetatable({ steps = {}, code = exit.ok }, Report) end

local function add(self, step)
  self.steps[#self.steps + 1] = step
  if output.is_json() then return end
  if step.ok and output.is_quiet() then return end
  local text = output.redact(step.text)
  io.stdout:write(step.ok and "✓ " or "✗ ", ("%-12s"):format(step.step), text, "\n")
  if step.advice then io.stdout:write((" "):rep(14), "→ ", output.redact(step.advice), "\n") end
  io.stdout:flush()
end

function Report:pass(name, text, data)
  add(self, { step = name, ok = true, text = text, data = data })
  return true
end

function Report:fail(name, code, text, advice, data)
  add(self, { step = name, ok = false, text = text, advice = advice, data = data })
  if self.code == exit.ok then self.code = code end
  return false
end

function Report:finish()
  if output.is_json() then
    local steps = {}
    for i, step in ipairs(self.steps) do
      steps[i] = {
        step = step.step, ok = step.ok, text = output.redact(step.text), data = step.data,
        advice = step.advice and output.redact(step.advice),
      }
    end
    output.result { ok = self.code == exit.ok, exit_code = self.code, steps = steps }
  end
  return self.code
end

local function ms(seconds)
  if seconds < 0.1 then return ("%.2f ms"):format(seconds * 1000) end
  return ("%.2f s"):format(seconds)
end

-- ---- Steps from below: each gets the patient, returns true when the next one makes sense ---------------

local steps = {}

function steps.uri(report, patient, args)
  local options, parsed, source = credentials.resolve(args)
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

-- Opens the port once more, with or without an unverified TLS.
local function again(patient)
  local probe = require "moonrabbit.cli.probe"
  return function(with_tls)
    local ctx = with_tls and context(patient.parsed.tls or {}, false) or nil
    return (probe.connect(patient.address, ctx, patient.parsed.host, 2))
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
  local kind = require "moonrabbit.cli.probe".plain(again(patient))
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

-- ---- Steps with a connection ------------------------------------------------------------------------

function steps.login(report, patient)
  local options = patient.options
  options.name, options.timeout = "moonrabbit doctor", patient.timeout
  options.connect_timeout = patient.timeout
  local began = connect.now()
  local conn, err = require "moonrabbit".connect(options)
  local external = patient.parsed.mechanism == "EXTERNAL"
  local user, vhost = external and "the certificate's user" or patient.parsed.user or "guest", patient.parsed.vhost
  if conn then
    patient.conn = conn
    report:pass("login", ("as %s, in %s"):format(user, ms(connect.now() - began)), { user = user })
    return report:pass("vhost", vhost, { vhost = vhost })
  end
  if err.kind == "vhost" then
    report:pass("login", "as " .. user, { user = user })
    return report:fail("vhost", exit.denied, tostring(err),
      ("is there a vhost '%s' (rabbitmqctl list_vhosts), and may %s use it (rabbitmqctl set_permissions)?"):format(
        vhost, user))
  elseif err.kind == "auth" then
    local advice = ("wrong user or password? (rabbitmqctl authenticate_user %s)"):format(user)
    if external then
      advice = "is the client certificate given (--cert, --key), and is the name in it a user of the broker?"
    elseif user == "guest" then
      advice = "wrong password? The broker lets 'guest' log in from its own machine only, unless told otherwise"
    end
    return report:fail("login", exit.denied, tostring(err), advice)
  end
  return report:fail("login", connect.exit_code(err, true), tostring(err),
    err.kind == "timeout" and "the broker is too busy to answer, or out of memory or disk: look at its log" or nil)
end

-- Each try on a channel of its own: the broker closes it when it says no.
local function try(conn, fn)
  local ch, err = conn:channel {}
  if not ch then return nil, err end
  local result
  result, err = fn(ch)
  ch:close()
  return result, err
end

local function permission_tries(conn)
  local queue
  local tries = { { "configure" }, { "write" }, { "read" } }
  local result, err = try(conn, function(ch)
    return ch:queue_declare("", { exclusive = true, auto_delete = true, durable = false })
  end)
  queue = result and result.queue
  tries[1].ok, tries[1].err = queue ~= nil, err
  result, err = try(conn, function(ch)
    -- A passive declare after it tells whether the publish was refused.
    local ok, problem = ch:publish("", { routing_key = queue or "amq.gen-moonrabbit-doctor", mandatory = false,
      expiration = "0" })
    if not ok then return nil, problem end
    return ch:exchange_declare("amq.direct", { passive = true })
  end)
  tries[2].ok, tries[2].err = result and true or false, err
  if queue then
    result, err = try(conn, function(ch)
      local msg, problem = ch:get(queue, { no_ack = true })
      if not msg and problem then return nil, problem end
      return true
    end)
    tries[3].ok, tries[3].err = result and true or false, err
    try(conn, function(ch) return ch:queue_delete(queue) end)
  end
  return tries
end

function steps.permissions(report, patient)
  local good, bad, data, other = {}, {}, {}, nil
  for _, one in ipairs(permission_tries(patient.conn)) do
    if one.ok then
      good[#good + 1] = one[1]
      data[one[1]] = true
    elseif one.err then
      bad[#bad + 1] = one[1]
      data[one[1]] = false
      if one.err.code ~= 403 then other = one.err end
    end
  end
  local granted = #good > 0 and table.concat(good, ", ") or "nothing"
  if #bad == 0 then
    return report:pass("permissions", granted .. " (tried with a temporary queue)", data)
  end
  if other then
    report:fail("permissions", exit.failed, tostring(other), nil, data)
  else
    report:fail("permissions", exit.denied, ("no permission to %s; may %s"):format(table.concat(bad, ", "), granted),
      ("tried with a temporary queue (amq.gen-…) and the default exchange; if %s needs them: rabbitmqctl "
        .. "set_permissions -p '%s' %s CONFIGURE WRITE READ"):format(patient.parsed.user or "guest",
        patient.parsed.vhost, patient.parsed.user or "guest"), data)
  end
  return patient.conn:state() == "open"
end

function steps.versions(report, patient)
  local server = patient.conn:server()
  local versions = {
    broker = server.version and (server.product or "RabbitMQ") .. " " .. server.version, erlang = server.platform,
    cluster = server.cluster_name,
    codec = "rabbitmq-c " .. require "moonrabbit.core".codec_version(),
    lua = rawget(_G, "jit") and rawget(_G, "jit").version or _VERSION,
  }
  local texts = {}
  for _, name in ipairs { "broker", "erlang", "cluster", "codec", "lua" } do
    texts[#texts + 1] = versions[name]
  end
  return report:pass("versions", table.concat(texts, ", "), versions)
end

function steps.tuned(report, patient)
  local server = patient.conn:server()
  local frame_max, channel_max, heartbeat = server.frame_max, server.channel_max, server.heartbeat
  return report:pass("tuned", ("frames up to %d bytes, %s channels, heartbeat every %d s"):format(frame_max,
    channel_max == 0 and "any number of" or tostring(channel_max), heartbeat),
    { frame_max = frame_max, channel_max = channel_max, heartbeat = heartbeat })
end

steps["round trip"] = function(report, patient, args)
  local ch, err = patient.conn:channel {}
  if not ch then return report:fail("round trip", exit.failed, tostring(err)) end
  local times = {}
  for i = 1, args.rounds do
    local began = connect.now()
    local ok
    ok, err = ch:exchange_declare("amq.direct", { passive = true })
    if not ok then return report:fail("round trip", exit.failed, tostring(err)) end
    times[i] = connect.now() - began
  end
  table.sort(times)
  local median = times[math.ceil(#times / 2)]
  return report:pass("round trip", ("%s median of %d (%s to %s)"):format(ms(median), #times, ms(times[1]),
    ms(times[#times])), { median = median, min = times[1], max = times[#times], rounds = #times })
end

local order = { "uri", "dns", "tcp", "tls", "protocol", "login", "permissions", "versions", "tuned", "round trip" }

function doctor.run(args)
  local report, patient = new_report(), {}
  for _, name in ipairs(order) do
    if not steps[name](report, patient, args) then break end
  end
  if patient.conn then patient.conn:close(patient.timeout) end
  if args.cluster and patient.parsed then doctor_cluster.look(report, patient, args) end
  return report:finish()
end

return doctor

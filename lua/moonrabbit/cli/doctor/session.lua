--- The steps of moonrabbit doctor that log in, and those with a connection.

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local ms = require("moonrabbit.cli.doctor.report").ms

local steps = {}

function steps.login(report, patient)
  local options = patient.options
  options.name, options.timeout = "moonrabbit doctor", patient.timeout
  options.connect_timeout, options.reconnect = patient.timeout, false
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
    if err.message:find("does not offer", 1, true) then
      advice = "the broker's auth_mechanisms do not have it (EXTERNAL: the plugin rabbitmq_auth_mechanism_ssl)"
    elseif external then
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

function steps.permissions(report, patient, args)
  if args.app then return true end -- asked by name, below
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

function steps.round_trip(report, patient, args)
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

return steps

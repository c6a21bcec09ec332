#!/usr/bin/env lua
-- How long the recovery of many queues, bindings and consumers takes, beside a raw pipelined script and one round
-- trip each, all in the same run:
--
--   scripts/with-broker -- lua5.4 bench/recovery.lua [QUEUES [CONSUMERS]]
--
-- kept: durable queues that still exist on the broker; made: exclusive ones, which are made anew. The line is cut
-- through a proxy in this process; the time is from the first attempt to connect to the event "recovered". Medians
-- of three.
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local proxy = require "support.proxy"

local queues, consumers = tonumber(arg[1] or 1000), tonumber(arg[2] or 500)
local url = assert(os.getenv "AMQP_URL", "AMQP_URL is not set")
local parsed = assert(moonrabbit.uri.parse(url))
local quiet = function() end

local function through(port)
  return ("amqp://%s:%s@127.0.0.1:%d/"):format(parsed.user or "guest", parsed.password or "guest", port)
end

local function name(kind, i) return ("bench-recovery-%s-%d"):format(kind, i) end

local function declare(ch, kind, opts)
  for i = 1, queues do
    opts.no_wait = true
    assert(ch:queue_declare(name(kind, i), opts))
    assert(ch:queue_bind(name(kind, i), "amq.direct", name(kind, i), { no_wait = true }))
  end
  assert(ch:queue_declare(name(kind, 1), { passive = true, timeout = 120 }))
end

local function delete_all(ch, kind)
  for i = 1, queues do assert(ch:queue_delete(name(kind, i), { no_wait = true })) end
  assert(ch:queue_declare("", { exclusive = true, timeout = 120 }))
end

-- What the recovery does, as somebody would write it by hand: all calls out at once, on the core, through the same
-- proxy, connecting included.
local function raw(kind, opts)
  local line = proxy.start(parsed.host, parsed.port)
  local started = native.now()
  local conn = assert(moonrabbit.connect { uri = through(line.port), reconnect = false, timeout = 120, log = quiet })
  local channels, wanted = {}, math.ceil(consumers / 10)
  moonrabbit.run(function()
    for _ = 1, wanted do
      moonrabbit.spawn(function()
        local channel = assert(conn:channel { prefetch = 10 })
        channels[#channels + 1] = channel
      end)
    end
    while #channels < wanted do moonrabbit.sleep(0) end
  end)
  local ch = assert(conn:channel())
  local session, calls = ch._session, {}
  local function call(method, fields)
    assert(ch._core:call(method, fields))
    calls[#calls + 1] = session:expect(ch._calls, method)
  end
  for i = 1, queues do
    call("queue.declare", { queue = name(kind, i), durable = opts.durable, exclusive = opts.exclusive })
  end
  for i = 1, queues do
    call("queue.bind", { queue = name(kind, i), exchange = "amq.direct", routing_key = name(kind, i) })
  end
  local function answered()
    for _, each in ipairs(calls) do assert(session:await(each, 120)) end
    calls = {}
  end
  answered() -- consumers are on other channels, which nothing else puts behind the declarations
  for i = 1, consumers do
    local channel = channels[(i - 1) % #channels + 1]
    assert(channel._core:consume { queue = name(kind, i), consumer_tag = "raw-" .. i })
    calls[#calls + 1] = session:expect(channel._calls, "basic.consume")
  end
  answered()
  local seconds = native.now() - started
  assert(conn:close(120))
  line:stop()
  return seconds
end

local function one_by_one(kind, opts)
  local conn = assert(moonrabbit.connect { uri = url, reconnect = false, timeout = 120, log = quiet })
  local ch = assert(conn:channel { prefetch = 10 })
  local started = native.now()
  for i = 1, queues do assert(ch:queue_declare(name(kind, i), opts)) end
  for i = 1, queues do assert(ch:queue_bind(name(kind, i), "amq.direct", name(kind, i))) end
  for i = 1, consumers do assert(ch:consume(name(kind, i))) end
  local seconds = native.now() - started
  assert(conn:close(120))
  return seconds
end

local function recovery(kind, opts)
  local line = proxy.start(parsed.host, parsed.port)
  local conn = assert(moonrabbit.connect { uri = through(line.port), timeout = 120, log = quiet,
    reconnect = { first = 3, jitter = 0, factor = 1 } }) -- by then the broker has forgotten what was exclusive
  local ch = assert(conn:channel())
  declare(ch, kind, opts)
  local channels = {}
  for i = 1, math.ceil(consumers / 10) do channels[i] = assert(conn:channel { prefetch = 10 }) end
  for i = 1, consumers do assert(channels[(i - 1) % #channels + 1]:consume(name(kind, i))) end
  local times = {}
  for round = 1, 3 do
    local began, ended
    local off_began = conn:on("recovering", function(_, _, delay) began = native.now() + delay end)
    local off_ended = conn:on("recovered", function() ended = native.now() end)
    local off_failed = conn:on("recovery_error", function(entity, err) error(entity.kind .. ": " .. tostring(err)) end)
    line:cut()
    while not ended do moonrabbit.sleep(0.001) end
    times[round] = ended - began
    off_began() off_ended() off_failed()
  end
  table.sort(times)
  assert(conn:close(120))
  line:stop()
  return times[2]
end

-- A broker forgets exclusive queues after their connection has ended.
local function settle() moonrabbit.sleep(tonumber(os.getenv "SETTLE" or 2)) end

print(("%d queues, %d bindings, %d consumers on %d channels; seconds"):format(queues, queues, consumers,
  math.ceil(consumers / 10)))
for _, case in ipairs { { "kept", { durable = true } }, { "made", { exclusive = true } } } do
  local kind, opts = case[1], case[2]
  local function copy() return { durable = opts.durable, exclusive = opts.exclusive } end
  local recovered = recovery(kind, copy())
  settle()
  local rounds = {}
  for i = 1, 3 do
    rounds[i] = raw(kind, copy())
    settle()
  end
  table.sort(rounds)
  local script = rounds[2]
  local single = one_by_one(kind, copy())
  settle()
  print(("%s: recovery %.3f, raw pipelined %.3f (%.2f times), one round trip each %.3f"):format(kind, recovered,
    script, recovered / script, single))
  if kind == "kept" then
    local conn = assert(moonrabbit.connect { uri = url, timeout = 120, log = quiet })
    delete_all(assert(conn:channel()), kind)
    assert(conn:close(120))
  end
end

-- An app that dies, or loses a connection, at each frame of a retry and of a dead letter, and a replay that dies at each
-- of its own: the message is there afterwards, once or more. A proxy kills it, before the n-th frame in either direction
-- goes on; nothing in the product knows of it.
local broker = require "support.broker"
local frame_proxy = require "support.frame_proxy"
local native = require "moonrabbit.runtime.native"
local process = require "support.process"
local ok = broker.ok

local it = broker.it_unless(it, pending, broker.none())

-- How many consumers run at once.
local AT_ONCE = 4

describe("a consumer that dies", function()
  local app, ch, queues

  before_each(function()
    if not broker.url then return end
    app, queues = broker.unique "crash", {}
    ch = ok(broker.connect():channel { confirm = true })
  end)

  after_each(function()
    if not ch then return end
    local names = { app .. ".home", app .. ".orphans", app .. ".wait.100ms", app .. ".dead" }
    for _, name in ipairs(names) do
      ok(ch:queue_delete(name))
      ok(ch:exchange_delete(name))
    end
    for _, queue in ipairs(queues) do ok(ch:queue_delete(queue)) end
    broker.close_all()
  end)

  local function new_queue(prefix, direction, n)
    local queue = ("%s.%s.%s.%d"):format(app, prefix, direction or "whole", n or 0)
    queues[#queues + 1] = queue
    ok(ch:queue_declare(queue, { durable = true }))
    return queue
  end

  -- Runs a program by a proxy that kills it (or cuts it off) at a frame: the proxy, and the exit code. words(url): what
  -- to run.
  local function run_through(direction, n, mode, words, options)
    local child
    local parsed = broker.parsed()
    local proxy = frame_proxy.start(parsed.host, parsed.port, direction, n, function()
      if mode == "kill" then child:signal "KILL" end
    end)
    child = process.start(words(broker.uri { host = "127.0.0.1", port = proxy.port }), options)
    local code
    broker.eventually(function()
      code = child:code()
      return code
    end, 60, "the consumer ends")
    assert(mode ~= "cut" and code ~= 1 or code == 0, ("frame %d %s: exit code %d: %s"):format(n or 0,
      direction or "", code, child:err()))
    child:stop()
    proxy:stop()
    return proxy, code
  end

  -- One message, one app, which is killed (or cut off) at a frame.
  local function run(direction, n, mode)
    local queue = new_queue("app", direction, n)
    ok(ch:publish(queue, { routing_key = queue }))
    return run_through(direction, n, mode, function(url)
      return { "spec/support/crash_child.lua", url, app, queue, mode == "cut" and "reconnect" or "die" }
    end)
  end

  -- Two dead letters of a queue, and their replay.
  local function replay(direction, n)
    local home, parking = new_queue("home", direction, n), new_queue("parking", direction, n)
    for i = 1, 2 do
      ok(ch:publish(home .. " " .. i, { routing_key = parking, headers = { ["moonrabbit-reason"] = "attempts",
        ["moonrabbit-queue"] = home } }))
    end
    return run_through(direction, n, "kill", function(url)
      return { "bin/moonrabbit", "dlq", "replay", parking, "--url", url }
    end), home, parking
  end

  -- Throws unless each of these kinds of frames was among those that it may die at.
  local function assert_seen(proxy, wanted)
    local seen = {}
    for _, each in ipairs(proxy.seen) do seen[each] = true end
    for _, each in ipairs(wanted) do assert.is_true(seen[each], each) end
  end

  -- fn(item) for each, some at once; throws what one throws.
  local function each_at_once(list, fn)
    local at, running, thrown = 0, AT_ONCE, nil
    for _ = 1, AT_ONCE do
      native.spawn(function()
        while at < #list and not thrown do
          at = at + 1
          local fine, err = require "moonrabbit".pcall(fn, list[at])
          if not fine then thrown = err end
        end
        running = running - 1
      end)
    end
    broker.eventually(function() return running == 0 end, 300, "all runs")
    if thrown then error(thrown, 0) end
  end

  local function drain(queue, into)
    while true do
      local msg = ok(ch:get(queue, { no_ack = true }))
      if not msg then return end
      into[msg.body] = (into[msg.body] or 0) + 1
    end
  end

  -- Where each message is in the end: nobody consumes any more, and what waited has come home.
  local function found()
    broker.eventually(function()
      return ok(ch:queue_declare(app .. ".wait.100ms", { passive = true })).message_count == 0
    end, 20, "the wait queue is empty")
    local there
    broker.eventually(function()
      there = there or {}
      for _, queue in ipairs(queues) do drain(queue, there) end
      drain(app .. ".dead", there)
      for _, queue in ipairs(queues) do
        if not there[queue] then return false end
      end
      return true
    end, 20, "every message is somewhere")
    drain(app .. ".orphans", there)
    return there
  end

  local function frames(direction, count)
    local list = {}
    for n = 1, count do list[n] = { direction, n } end
    return list
  end

  for _, mode in ipairs { "kill", "cut" } do
    local what = mode == "kill" and "leaves its message once or more, whichever frame was its last"
      or "of its connection, and comes back, parks its message once or more"
    it(what, function()
      local whole = run(nil, nil, mode)
      -- Declaring the step, publishing, acking; deliveries, answers, confirms.
      assert_seen(whole, { "up 20.10", "up 40.10", "up 50.10", "up 50.20", "up 60.40", "up header", "up body",
        "up 60.80", "down 60.60", "down header", "down body", "down 20.11", "down 40.11", "down 50.11", "down 50.21",
        "down 60.80" })
      for _, direction in ipairs { "up", "down" } do
        -- The first delivery opens the count; every later frame is a point to die at.
        local killed = 0
        each_at_once(frames(direction, whole.counts[direction]), function(point)
          local proxy = run(point[1], point[2], mode)
          if proxy.done then killed = killed + 1 end
        end)
        -- Acks gather differently from run to run: a few of the last frames may not have come.
        assert.is_true(killed >= whole.counts[direction] - 4, killed .. " of " .. whole.counts[direction])
      end
      for queue, count in pairs(found()) do assert.is_true(count >= 1 and count <= 3, queue .. ": " .. count) end
    end)
  end

  it("of a replay leaves every dead letter once or more, whichever frame was its last", function()
    local whole = replay()
    assert_seen(whole, { "up 60.70", "up 60.40", "up header", "up body", "up 60.80", "down 60.71", "down header",
      "down body", "down 60.80" })
    for _, direction in ipairs { "up", "down" } do
      each_at_once(frames(direction, whole.counts[direction]), function(point)
        local _, home, parking = replay(point[1], point[2])
        local there = {}
        broker.eventually(function()
          drain(home, there)
          drain(parking, there)
          return there[home .. " 1"] and there[home .. " 2"]
        end, 20, "both are somewhere")
        for i = 1, 2 do assert.is_true(there[home .. " " .. i] <= 2) end
      end)
    end
  end)
end)

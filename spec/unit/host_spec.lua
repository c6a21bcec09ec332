-- The life of an app in a process, where its script throws as it starts, and over reloads; against brokers that follow
-- a script.
local moonrabbit = require "moonrabbit"
local Host = require "moonrabbit.life.host"
local fake = require "support.fake_broker"
local native = require "moonrabbit.runtime.native"
local scripted = require "support.scripted"

local short, u16 = fake.short, fake.u16
local route = moonrabbit.route

describe("a host", function()
  local brokers, runtime, log, host, recover, reconnect

  -- The first connection is that to consume, the second that to publish.
  before_each(function()
    brokers, log, host = { scripted.start(), scripted.start() }, {}, nil
    recover, reconnect = true, false
    local opened = 0
    runtime = setmetatable({ open = function(...)
      opened = opened + 1
      return brokers[opened].runtime.open(...)
    end }, { __index = native, __newindex = native })
    brokers[1].answers["50.10"], brokers[1].answers["60.30"] = scripted.declared, scripted.cancelled
  end)

  local function eventually(fn) scripted.eventually(fn, 5) end

  local function app_of(fields)
    local consumer = { queue = "q", dead_letter = false, in_process = true, handler = function() end }
    for name, value in pairs(fields or {}) do consumer[name] = value end
    if consumer.route then consumer.handler = nil end
    return moonrabbit.app { name = "x", queues = { q = {} }, consumers = { consumer } }
  end

  -- Runs `first`; a reload takes `second`, or what that function gives.
  local function run(first, second, fn)
    local reloads = {}
    host = Host.new {
      runtime = native, connect = { uri = "amqp://guest:guest@127.0.0.1/", runtime = runtime, reconnect = reconnect,
        recover = recover },
      load = function() return type(second) == "function" and second() or second end, drain = 5,
      log = function(level, text) log[#log + 1] = level .. " " .. text end,
      reloaded = function(ok, problem) reloads[#reloads + 1] = { ok, tostring(problem) } end,
    }
    local ended
    moonrabbit.run(function()
      moonrabbit.spawn(function() ended = { host:run(first) } end)
      if fn then
        eventually(function() return host.phase == "running" end)
        fn(function()
          local before = #reloads
          host:reload()
          eventually(function() return #reloads > before and not host.reloading end)
          return reloads[#reloads][1], reloads[#reloads][2]
        end)
        host:stop()
      end
      eventually(function() return ended end)
    end)
    for _, connection in pairs(host.connections) do connection:close(1) end
    return ended[1], ended[2]
  end

  -- A consumer that is started says where its messages go.
  local consumer_channel, consumer_tag
  local function consumes()
    brokers[1].answers["60.20"] = function(frame)
      consumer_channel, consumer_tag = frame.channel, scripted.tag(frame)
      return fake.method(frame.channel, 60, 21, short(consumer_tag))
    end
  end
  local function deliver(n) brokers[1]:say(fake.deliver(consumer_channel, consumer_tag, n, "x")) end

  local function throwing(fields)
    fields = fields or {}
    local function nothing() end
    fields.dedupe = { begin = nothing, commit = nothing, abort = nothing }
    function fields.dedupe.attach() error("no library", 0) end
    return app_of(fields)
  end

  local function in_order() return "key" end

  it("ends where its app throws as it starts", function()
    local ok, err = run(throwing())
    assert.is_nil(ok)
    assert.truthy(tostring(err):find("starting the app threw: no library", 1, true), tostring(err))
  end)

  for what, order_by in pairs { ["beside it"] = false, ["after it has drained"] = in_order } do
    it("goes on with the old script where the new one, started " .. what .. ", throws", function()
      consumes()
      local handled = 0
      run(app_of { order_by = order_by or nil, handler = function() handled = handled + 1 end },
        throwing { order_by = order_by or nil }, function(reload)
          local ok, problem = reload()
          assert.is_nil(ok)
          assert.truthy(problem:find("no library", 1, true), problem)
          deliver(1)
          eventually(function() return handled == 1 end)
        end)
    end)
  end

  it("starts the old script again where its own store throws when it is asked for its state", function()
    consumes()
    local handled = 0
    local function yes() return "new" end
    local function own_store()
      return { begin = yes, commit = yes, abort = yes, state = function() error "no state" end }
    end
    run(app_of { order_by = in_order, dedupe = own_store(), handler = function() handled = handled + 1 end },
      app_of { order_by = in_order, dedupe = own_store() }, function(reload)
        assert.is_false((reload()))
        deliver(1)
        eventually(function() return handled == 1 end)
      end)
  end)

  it("keeps the limits of a store in memory where the new script is refused, and takes over those of one that starts",
  function()
    local declared = brokers[1].answers["50.10"]
    local refuses = true
    brokers[1].answers["50.10"] = function(frame)
      if not refuses or brokers[1]:times("50.10") == 1 then return declared(frame) end
      return fake.method(frame.channel, 20, 40, u16(406) .. short "PRECONDITION_FAILED" .. u16(50) .. u16(10))
    end
    local store = moonrabbit.dedupe.memory { ttl = 60, max = 10 }
    local function new() return app_of { dedupe = moonrabbit.dedupe.memory { ttl = 5, max = 3 } } end
    run(app_of { dedupe = store }, new, function(reload)
      assert.is_nil((reload()))
      assert.same({ 60, 10 }, { store.ttl, store.max })
      refuses = false
      assert.is_true((reload()))
      assert.same({ 5, 3 }, { store.ttl, store.max })
    end)
  end)

  it("ends where a consumer does not come back with its connection", function()
    consumes()
    recover, reconnect = false, { first = 0.01, max = 0.05 }
    local err
    local third = scripted.start()
    brokers[3] = third
    moonrabbit.run(function()
      moonrabbit.spawn(function()
        eventually(function() return host and host.phase == "running" end)
        brokers[1]:cut()
      end)
    end)
    err = select(2, run(app_of()))
    assert.equal("closed", err.kind)
  end)

  it("ends where connecting throws", function()
    rawset(runtime, "open", function() error("no sockets", 0) end)
    local ok, err = run(app_of())
    assert.is_nil(ok)
    assert.truthy(tostring(err):find("no sockets", 1, true), tostring(err))
  end)

  it("ends as it was asked to where that comes while its app begins to consume", function()
    local frame
    brokers[1].answers["60.20"] = function(asked)
      frame = asked
      return ""
    end
    moonrabbit.spawn(function()
      eventually(function() return frame end)
      host:stop()
      moonrabbit.sleep(0)
      brokers[1]:say(fake.method(frame.channel, 60, 21, short(scripted.tag(frame))))
    end)
    assert.is_true((run(app_of())))
    assert.is_nil(table.concat(log, "\n"):find("trying again", 1, true))
    assert.equal("stopped", host.app.state)
  end)

  -- A message before a reload and one after it.
  local function around_reload(reload, seen)
    deliver(1)
    eventually(function() return #seen == 1 end)
    reload()
    deliver(1)
    eventually(function() return #seen == 2 end)
  end

  it("keeps a canary rolled back where the old script had to start again", function()
    consumes()
    local seen = {}
    local app = app_of { order_by = in_order, route = route.canary { name = "pay", weight = 100,
      candidate = function()
        seen[#seen + 1] = "candidate"
        return nil, "no"
      end,
      stable = function() seen[#seen + 1] = "stable" end,
      rollback = { error_rate = 0.1, min = 1 },
    } }
    run(app, throwing { order_by = in_order }, function(reload) around_reload(reload, seen) end)
    assert.same({ "candidate", "stable" }, seen)
  end)

  it("hands over what became of breakers and canaries while the old script drained", function()
    consumes()
    local seen = {}
    local function app(name)
      return app_of { order_by = in_order, route = route.canary { name = "pay", weight = 100,
        candidate = function()
          seen[#seen + 1] = name .. " candidate"
          moonrabbit.sleep(0.05)
          return nil, "no"
        end,
        stable = function() seen[#seen + 1] = name .. " stable" end,
        rollback = { error_rate = 0.1, min = 1 },
      } }
    end
    run(app "old", app "new", function(reload) around_reload(reload, seen) end)
    assert.same({ "old candidate", "new stable" }, seen)
  end)

  it("leaves nothing of the old scripts on its connections", function()
    consumes()
    run(app_of(), app_of(), function(reload)
      local before = #host.connections.consume._listeners.closed
      reload()
      eventually(function() return host.retiring == 0 end)
      assert.equal(before, #host.connections.consume._listeners.closed)
    end)
  end)
end)

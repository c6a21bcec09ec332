-- How an app begins and ends on two connections, against brokers that follow a script: what it leaves behind, and
-- what happens meanwhile.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local fake = require "support.fake_broker"
local scripted = require "support.scripted"

local short, u32 = fake.short, fake.u32

describe("an app on connections of its user's", function()
  local consuming, publishing, conns

  local function open(more)
    local other = scripted.start()
    other.answers["50.10"], other.answers["60.30"] = scripted.declared, scripted.cancelled
    local opts = { uri = "amqp://guest:guest@127.0.0.1/", runtime = other.runtime, log = function() end,
      reconnect = false }
    for name, value in pairs(more or {}) do opts[name] = value end
    return other, assert(moonrabbit.connect(opts))
  end

  before_each(function()
    conns = {}
    consuming, conns.consume = open()
    publishing, conns.publish = open()
  end)

  after_each(function()
    conns.consume:close(1)
    conns.publish:close(1)
  end)

  local function app_of(fields, more)
    local consumer = { queue = "q", dead_letter = false, in_process = true, handler = function() end }
    for name, value in pairs(fields or {}) do consumer[name] = value end
    local spec = { name = "x", log = function() end, queues = { q = {} }, consumers = { consumer } }
    for name, value in pairs(more or {}) do spec[name] = value end
    return moonrabbit.app(spec)
  end

  -- With a consumer of `q`, whose handler this is, and one of `r`.
  local function app_of_two(handler)
    return moonrabbit.app { name = "x", log = function() end, queues = { q = {}, r = {} }, consumers = {
      { queue = "q", dead_letter = false, in_process = true, handler = handler },
      { queue = "r", dead_letter = false, in_process = true, handler = function() end },
    } }
  end

  local function eventually(fn) scripted.eventually(fn, 5) end

  -- The n-th message of the consumer that was started last.
  local consumer_channel, consumer_tag
  local function consumes()
    consuming.answers["60.20"] = function(frame)
      consumer_channel, consumer_tag = frame.channel, scripted.tag(frame)
      return fake.method(frame.channel, 60, 21, short(consumer_tag))
    end
  end
  local function deliver(n, body) consuming:say(fake.deliver(consumer_channel, consumer_tag, n, body or "x")) end

  it("leaves no listener there when it stops", function()
    local app = app_of()
    for _ = 1, 3 do
      assert(app:start(conns))
      assert(app:stop(1))
    end
    assert.same({ 0, 0 }, { #conns.consume._listeners.closed, #conns.publish._listeners.closed })
  end)

  it("does not start where the connection to publish ended for good meanwhile", function()
    local app = app_of()
    consuming.answers["50.10"] = false
    local ok, err
    moonrabbit.run(function()
      moonrabbit.spawn(function() ok, err = app:start(conns) end)
      eventually(function() return consuming:times("50.10") == 1 end)
      conns.publish:close(1)
      consuming:say(fake.method(1, 50, 11, short "q" .. u32(0) .. u32(0)))
      eventually(function() return app.state ~= "starting" end)
      eventually(function() return err end)
    end)
    assert.is_nil(ok)
    assert.equal("closed", err.kind)
    assert.equal("stopped", app.state)
  end)

  it("takes no more from the other one when one is lost for good", function()
    consumes()
    local app = app_of()
    moonrabbit.run(function()
      assert(app:start(conns))
      publishing:cut()
      eventually(function() return app.state == "stopped" end)
      assert.equal("closed", app.reason.kind)
      eventually(function() return consuming:times("20.40") == 2 end) -- the channel of its declarations, and this one
    end)
  end)

  it("ends where a consumer does not come back with its connection", function()
    conns.consume:close(1)
    consuming, conns.consume = open { reconnect = { first = 0.01, max = 0.05 }, recover = false }
    consumes()
    local logged
    local app = app_of({}, { log = function(level, text) logged = level == "error" and text or logged end })
    moonrabbit.run(function()
      assert(app:start(conns))
      consuming:cut()
      eventually(function() return app.state == "stopped" end)
      local ok, err = app:wait()
      assert.is_nil(ok)
      assert.equal("closed", err.kind)
      assert.truthy(logged:find("the app 'x' has lost the consumer of 'q'", 1, true), logged)
    end)
  end)

  it("handles what the others have when a consumer is lost", function()
    conns.consume:close(1)
    consuming, conns.consume = open { recover = false }
    local tags, done = {}, false
    consuming.answers["60.20"] = function(frame)
      tags[#tags + 1] = { frame.channel, scripted.tag(frame) }
      return fake.method(frame.channel, 60, 21, short(scripted.tag(frame)))
    end
    local app = app_of_two(function()
      moonrabbit.sleep(0.05)
      done = true
    end)
    moonrabbit.run(function()
      assert(app:start(conns))
      consuming:say(fake.deliver(tags[1][1], tags[1][2], 1, "x"))
      moonrabbit.sleep(0.01)
      consuming:say(fake.method(tags[2][1], 60, 30, short(tags[2][2]) .. "\1")) -- its queue was deleted
      local ok, err = app:wait()
      assert.is_nil(ok)
      assert.equal("cancelled", err.kind)
    end)
    assert.is_true(done)
    assert.equal(1, consuming:times("60.80"))
  end)

  it("does not start where a consumer has ended right behind its start", function()
    local app
    local spec = { name = "x", log = function() end, queues = { q = {}, r = {} }, consumers = {
      { queue = "q", dead_letter = false, in_process = true, handler = function() end },
      { queue = "r", dead_letter = false, in_process = true, handler = function() end },
    } }
    local first
    consuming.answers["60.20"] = function(frame)
      local behind = first and fake.method(first, 20, 40, fake.u16(406) .. short "GONE" .. fake.u16(60) .. fake.u16(20))
      first = first or frame.channel
      return (behind or "") .. fake.method(frame.channel, 60, 21, short(scripted.tag(frame)))
    end
    app = moonrabbit.app(spec)
    local ok, err
    moonrabbit.run(function() ok, err = app:start(conns) end)
    assert.is_nil(ok)
    assert.equal(406, err.code)
    assert.equal("stopped", app.state)
  end)

  it("makes no copy of what the broker has taken back, though both connections have come back", function()
    conns.consume:close(1)
    conns.publish:close(1)
    local back = { reconnect = { first = 0.01, max = 0.05 } }
    consuming, conns.consume = open(back)
    publishing, conns.publish = open(back)
    consumes()
    for id, answer in pairs { ["40.10"] = "40.11", ["50.20"] = "50.21" } do
      local class, method = answer:match "(%d+)%.(%d+)"
      for _, other in ipairs { consuming, publishing } do
        other.answers[id] = function(frame) return fake.method(frame.channel, tonumber(class), tonumber(method)) end
      end
    end
    local app = app_of { in_process = false, retry = function() return 5 end,
      handler = function() return nil, "no" end }
    moonrabbit.run(function()
      assert(app:start(conns))
      deliver(1)
      eventually(function() return publishing:times("60.40") == 1 end) -- it is not confirmed
      consuming:cut()
      eventually(function() return consuming:times("60.20") == 2 end)
      publishing:cut()
      eventually(function() return app.runners[1].in_flight == 0 end)
      assert.equal("running", app.state)
      assert.equal(1, publishing:times("60.40"))
      assert.is_true(app:stop(1))
    end)
  end)

  it("publishes nothing once it has stopped, and opens no channel for that", function()
    local app = app_of()
    assert(app:start(conns))
    assert(app:stop(1))
    local opened = publishing:times("20.10")
    local ok, err = app:publish("late", { routing_key = "q" })
    assert.is_nil(ok)
    assert.equal("the app is not running", err.message)
    assert.equal(opened, publishing:times("20.10"))
  end)

  it("leaves no channel to a handler that publishes just as it ends", function()
    consumes()
    local answer
    local app = app_of { handler = function(_, app)
      pcall(moonrabbit.sleep, 5) -- until it is cancelled
      answer = { app:publish("late", { routing_key = "q" }) }
    end }
    publishing.answers["20.10"], publishing.answers["85.10"] = false, false
    moonrabbit.run(function()
      assert(app:start(conns))
      deliver(1)
      moonrabbit.sleep(0.01)
      app:stop(0.05)
      assert.equal("stopped", app.state)
      publishing:say(fake.method(1, 20, 11, fake.long "") .. fake.method(1, 85, 11))
      eventually(function() return answer end)
      assert.is_nil(answer[1])
      eventually(function() return publishing:times("20.10") == publishing:times("20.40") end)
    end)
  end)

  it("that is told to stop while it starts consumes nothing", function()
    local app, declared = app_of(), consuming.answers["50.10"]
    consuming.answers["50.10"] = false
    local ok, err
    moonrabbit.run(function()
      moonrabbit.spawn(function() ok, err = app:start(conns) end)
      eventually(function() return consuming:times("50.10") == 1 end)
      assert.is_true(app:stop(1))
      consuming:say(fake.method(1, 50, 11, short "q" .. u32(0) .. u32(0)))
      eventually(function() return err end)
    end)
    assert.is_nil(ok)
    assert.equal("stopped", app.state)
    assert.equal(0, consuming:times("60.20"))
    consuming.answers["50.10"] = declared
    assert(app:start(conns))
    assert(app:stop(1))
  end)

  for name, what in pairs { q = "a queue", ["x.orphans"] = "its ladder", ["x.dead"] = "its dead letters" } do
    it("leaves no channel where its start is cancelled as it declares " .. what, function()
      local declared, late = consuming.answers["50.10"], nil
      consuming.answers["50.10"] = function(frame)
        if scripted.queue(frame) ~= name then return declared(frame) end
        late = declared(frame)
        return ""
      end
      consuming.answers["20.40"] = function(frame)
        local answers = (late or "") .. fake.method(frame.channel, 20, 41)
        late = nil
        return answers
      end
      consuming.answers["40.10"] = function(frame) return fake.method(frame.channel, 40, 11) end
      consuming.answers["50.20"] = function(frame) return fake.method(frame.channel, 50, 21) end
      local app = app_of { in_process = false }
      app.plan.consumers[1].dead_letter = nil -- the default
      moonrabbit.run(function()
        local task = moonrabbit.spawn(function() app:start(conns) end)
        eventually(function() return late end)
        native.cancel(task)
        eventually(function() return app.state == "stopped" end)
      end)
      assert.equal("open", (conns.consume:state()))
      assert.equal(consuming:times("20.10"), consuming:times("20.40"))
    end)
  end

  it("that is told to stop while the second of its consumers starts handles what the first has", function()
    local said, done, second = 0, false, nil
    consuming.answers["60.20"] = function(frame)
      local started = fake.method(frame.channel, 60, 21, short(scripted.tag(frame)))
      said = said + 1
      if said == 1 then return started .. fake.deliver(frame.channel, scripted.tag(frame), 1, "x") end
      second = started
      return ""
    end
    local app = app_of_two(function()
      moonrabbit.sleep(0.05)
      done = true
    end)
    moonrabbit.run(function()
      moonrabbit.spawn(function() app:start(conns) end)
      eventually(function() return said == 2 end)
      moonrabbit.spawn(function()
        moonrabbit.sleep(0.01)
        consuming:say(second)
      end)
      assert.is_true(app:stop(5))
    end)
    assert.equal("stopped", app.state)
    assert.is_true(done)
    assert.equal(1, consuming:times("60.80"))
  end)

  -- Starts an app whose last consumer is not answered until `answer()`; fn(app, answer), and what start says then.
  local function nearly_started(app, fn)
    local frame, started
    consuming.answers["60.20"] = function(asked)
      frame = asked
      return ""
    end
    moonrabbit.run(function()
      moonrabbit.spawn(function() started = { app:start(conns) } end)
      eventually(function() return frame end)
      fn(function(more)
        local channel, tag = frame.channel, scripted.tag(frame)
        consuming:say(fake.method(channel, 60, 21, short(tag)) .. (more and fake.deliver(channel, tag, 1, "x") or ""))
      end)
      eventually(function() return started end)
    end)
    assert.is_nil(started[1])
    assert.truthy(started[2].message:find("stopped while it started", 1, true), started[2].message)
    assert.equal("stopped", app.state)
    assert.equal(2, consuming:times("20.40")) -- the channel of its declarations, and its consumer's
  end

  it("that is told to stop at once as its last consumer starts does not run on", function()
    local app = app_of()
    nearly_started(app, function(answer)
      local ok, err = app:stop(0)
      assert.is_nil(ok)
      assert.equal("the app was still starting", err.message)
      answer()
    end)
  end)

  it("does not run on where the task is cancelled that has told it to stop while it starts", function()
    local app = app_of()
    nearly_started(app, function(answer)
      local task = moonrabbit.spawn(function() app:stop(60) end)
      moonrabbit.sleep(0)
      native.cancel(task)
      moonrabbit.sleep(0)
      answer()
    end)
  end)

  it("tells who has stopped it while it started what was not done", function()
    local app = app_of { handler = function() moonrabbit.sleep(60) end }
    nearly_started(app, function(answer)
      local ok, err
      moonrabbit.spawn(function() ok, err = app:stop(0.05) end)
      moonrabbit.sleep(0)
      answer(true)
      eventually(function() return err end)
      assert.is_nil(ok)
      assert.truthy(err.message:find "^1 messages were not done in time", err.message)
      assert.equal("stopped", app.state)
    end)
  end)

  it("may be started again as soon as it has ended, whatever else it still closes", function()
    local app, again, closed = app_of(), {}, consuming.answers["20.40"]
    moonrabbit.run(function()
      assert(app:start(conns))
      local frame
      consuming.answers["20.40"] = function(asked)
        frame = asked
        return ""
      end
      publishing:cut()
      assert.is_nil((app:wait()))
      eventually(function() return frame end)
      local _
      _, again.consume = open()
      _, again.publish = open()
      assert(app:start(again))
      consuming:say(fake.method(frame.channel, 20, 41)) -- now it closes the rest
      for _ = 1, 10 do moonrabbit.sleep(0) end
      assert.is_false(app._outgoing.closed)
      assert.same({ 0, 1, 1 },
        { #conns.consume._listeners.closed, #again.consume._listeners.closed, #again.publish._listeners.closed })
      again.publish:close(1)
      eventually(function() return app.state == "stopped" end)
      again.consume:close(1)
    end)
    consuming.answers["20.40"] = closed
  end)

  it("has stopped when a second stop returns", function()
    consumes()
    local running, go_on = false, false
    local app = app_of { handler = function()
      running = true
      while not go_on do moonrabbit.sleep(0.001) end
    end }
    moonrabbit.run(function()
      assert(app:start(conns))
      deliver(1)
      while not running do moonrabbit.sleep(0.001) end
      moonrabbit.spawn(function() app:stop(5) end)
      moonrabbit.sleep(0)
      local ok, err = app:stop(0.01)
      assert.is_nil(ok)
      assert.equal("timeout", err.kind)
      go_on = true
      assert.is_true(app:stop(5))
      assert.equal("stopped", app.state)
    end)
  end)

  it("is not stopped by one of its handlers, which would wait for itself", function()
    consumes()
    local problem
    local app = app_of { handler = function(_, app)
      local ok, err = moonrabbit.pcall(app.stop, app, 5)
      problem = not ok and err
      moonrabbit.spawn(function() app:stop(5) end)
    end }
    moonrabbit.run(function()
      assert(app:start(conns))
      deliver(1)
      assert.is_true(app:wait())
    end)
    assert.truthy(problem:find("wait for itself", 1, true))
    assert.equal(1, consuming:times("60.80"))
  end)

  it("is stopped though the task that stops it is cancelled", function()
    consumes()
    local app = app_of { handler = function() moonrabbit.sleep(60) end }
    moonrabbit.run(function()
      assert(app:start(conns))
      deliver(1)
      moonrabbit.sleep(0.01)
      local task = moonrabbit.spawn(function() app:stop(60) end)
      moonrabbit.sleep(0.01)
      assert.equal("stopping", app.state)
      native.cancel(task)
      assert.is_true(app:wait())
      eventually(function() return consuming:times("20.40") == 2 end)
    end)
  end)

  it("is waited for until it has stopped, though it starts again at once", function()
    local app, waited = app_of(), nil
    moonrabbit.run(function()
      assert(app:start(conns))
      moonrabbit.spawn(function() waited = app:wait() end)
      moonrabbit.sleep(0)
      assert(app:stop(1))
      assert(app:start(conns))
      assert.is_true(waited)
      assert(app:stop(1))
    end)
  end)

  it("says that it was not started to whoever waits for it", function()
    local app = app_of()
    local ok, err = pcall(function() app:wait() end)
    assert.is_false(ok)
    assert.truthy(err:find("app_life_spec.lua:%d+: app:wait: the app has not been started"), err)
  end)

  it("goes on where its log throws", function()
    consumes()
    local handled = 0
    local app = app_of({ concurrency = 1, handler = function(msg)
      handled = handled + 1
      msg:ack() -- which is logged
    end }, { log = function() error "the log is full" end })
    local stderr = io.stderr
    io.stderr = { write = function() end } -- luacheck: ignore 122
    finally(function() io.stderr = stderr end) -- luacheck: ignore 122
    moonrabbit.run(function()
      assert(app:start(conns))
      for n = 1, 3 do deliver(n) end
      eventually(function() return handled == 3 end)
      assert.equal(0, app.runners[1].in_flight)
      assert.is_true(app:stop(1))
    end)
  end)

  it("says which declaration failed, and leaves the error of the connection as it was", function()
    local app = app_of()
    consuming.answers["50.10"] = function() consuming:cut() return "" end
    local ok, err
    moonrabbit.run(function() ok, err = app:start(conns) end)
    assert.is_nil(ok)
    assert.truthy(err.message:find("^queue 'q': "), err.message)
    local _, reason = conns.consume:state()
    assert.is_nil(reason.message:find("queue 'q'", 1, true), reason.message)
  end)
end)

-- `moonrabbit run` as a process, with signals.
local broker = require "support.broker"
local process = require "support.process"

local it_runs = broker.it_unless(it, pending, broker.none())

describe("moonrabbit run", function()
  local files, running = {}, {}

  local function write(path, text)
    local file = assert(io.open(path, "w"))
    file:write(text)
    file:close()
  end

  local function file(text)
    local path = process.file(text)
    files[#files + 1] = path
    return path
  end

  after_each(function()
    for i = #running, 1, -1 do
      running[i]:stop()
      running[i] = nil
    end
    for i = #files, 1, -1 do
      os.remove(files[i])
      files[i] = nil
    end
    broker.close_all()
  end)

  -- What an app does with each message: a line on stdout, after a pause.
  local function app(queue, version, pause)
    return ([[
      local mr = require "moonrabbit"
      io.stdout:setvbuf "no"
      return mr.app { name = %q, queues = { [%q] = { type = "classic" } }, consumers = { { queue = %q, concurrency = 4,
        handler = function(msg)
          io.stdout:write("begin ", msg.body, "\n")
          mr.sleep(%g)
          io.stdout:write(%q, " ", msg.body, "\n")
        end } } }
    ]]):format(queue, queue, queue, pause or 0, version)
  end

  local function start(path, ...)
    local child = process.start({ "bin/moonrabbit", "run", path, ... }, { env = { AMQP_URL = broker.url } })
    running[#running + 1] = child
    return child
  end

  local function said(child, text)
    broker.eventually(function() return child:err():find(text, 1, true) end, 30, text .. " in: " .. child:err())
  end

  it("checks a script, and says where it is wrong", function()
    local function check(text)
      return process.run { "bin/moonrabbit", "run", "--check", file(text) }
    end
    local result = check(app("some", "v1"))
    assert.equal(0, result.code)
    assert.matches("the app 'some' with 1 consumers is in order", result.err)
    result = check "local x = = 1"
    assert.equal(2, result.code)
    assert.matches(":1: unexpected symbol", result.err)
    result = check "\n\nerror 'no such setting'"
    assert.equal(2, result.code)
    assert.matches(":3: no such setting", result.err)
    result = check "return 17"
    assert.equal(2, result.code)
    assert.matches("must return mr.app", result.err)
    result = check "\nreturn require 'moonrabbit'.app { name = 'x', consumers = { { que = 'y' } } }"
    assert.equal(2, result.code)
    assert.matches("consumers%[1%]: unknown option 'que'", result.err)
    assert.truthy(result.err:find(files[#files], 1, true))
    result = process.run { "bin/moonrabbit", "run", "--check", "/nonexistent.lua" }
    assert.equal(2, result.code)
  end)

  it_runs("drains what is in hand on SIGTERM, and ends with 0", function()
    local queue = broker.unique "run"
    local child = start(file(app(queue, "done", 0.5)))
    said(child, "runs")
    local ch = broker.ok(broker.connect():channel { confirm = true })
    for i = 1, 3 do broker.ok(ch:publish("m" .. i, { routing_key = queue })) end
    assert.is_true(child:await("begin m3", 30))
    child:signal "TERM"
    assert.equal(0, child:wait(30))
    for i = 1, 3 do assert.truthy(child:out():find("done m" .. i, 1, true), child:out()) end
    assert.equal(0, broker.ok(ch:queue_declare(queue, { passive = true })).message_count)
    ch:queue_delete(queue)
  end)

  it_runs("gives back what is not done in time, and ends with 1; a second signal ends it at once", function()
    local queue = broker.unique "run"
    local path = file(app(queue, "done", 1000))
    local child = start(path, "--drain", "0.1")
    said(child, "runs")
    local ch = broker.ok(broker.connect():channel { confirm = true })
    broker.ok(ch:publish("m", { routing_key = queue }))
    assert.is_true(child:await("begin m", 30))
    child:signal "INT"
    assert.equal(1, child:wait(30))
    assert.equal(1, broker.ok(ch:queue_declare(queue, { passive = true })).message_count)
    child = start(path, "--drain", "1000")
    assert.is_true(child:await("begin m", 30))
    child:signal "TERM"
    said(child, "stopping")
    child:signal "TERM"
    assert.equal(143, child:wait(30))
    ch:queue_delete(queue)
  end)

  it_runs("reloads on SIGHUP under load without losing a message; a broken script leaves the old one", function()
    local queue = broker.unique "run"
    local path = file(app(queue, "v1"))
    local child = start(path)
    said(child, "runs")
    local publisher = broker.ok(broker.connect():publisher { routing_key = queue })
    local sent = 0
    local function send(n)
      for _ = 1, n do
        sent = sent + 1
        broker.ok(publisher:send_async("m" .. sent .. "."))
      end
      broker.ok(publisher:wait(30))
    end
    send(200)
    write(path, "this is no Lua")
    child:signal "HUP"
    said(child, "the old one goes on")
    send(200)
    assert.is_true(child:await("v1 m" .. sent .. ".", 30))
    write(path, app(queue, "v2"))
    child:signal "HUP"
    send(200)
    said(child, "reloaded")
    broker.eventually(function() -- the old one takes its last ones meanwhile
      send(20)
      return child:out():find("v2 m", 1, true)
    end, 30, "v2 at work")
    broker.eventually(function()
      local out = child:out()
      for i = 1, sent do
        if not out:find(" m" .. i .. ".", 1, true) then return false end
      end
      return true
    end, 30, "every message handled")
    child:signal "TERM"
    assert.equal(0, child:wait(30))
    broker.ok(broker.ok(broker.connect():channel()):queue_delete(queue))
  end)

  it("ends with the code of what is wrong for good, and waits for a broker that is away", function()
    local path = file(app("q", "v"))
    if broker.url then
      local denied = process.run({ "bin/moonrabbit", "run", path },
        { env = { AMQP_URL = broker.uri { password = "wrong-pass-4711" } } })
      assert.equal(4, denied.code)
      assert.is_nil(denied.err:find("wrong-pass-4711", 1, true))
    end
    local child = process.start({ "bin/moonrabbit", "run", path }, { env = { AMQP_URL = "amqp://127.0.0.1:1" } })
    running[#running + 1] = child
    said(child, "connecting")
    child:signal "TERM"
    assert.equal(0, child:wait(30))
  end)
end)

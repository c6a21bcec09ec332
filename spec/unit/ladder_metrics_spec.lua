-- Ladders as metrics, with a broker and a management API that answer what the spec says.
local errors = require "moonrabbit.errors"
local ladder = require "moonrabbit.app.ladder"
local mr = require "moonrabbit"
local virtual = require "support.virtual_loop"

local metrics = mr.metrics

describe("the metrics of ladders", function()
  local runtime, m, queues, asked, away, log, made, off

  local function connection()
    return {
      _runtime = runtime, _target = { vhost = "v" },
      channel = function()
        if away then return nil, errors.new { kind = "closed", message = "away" } end
        local open = true
        return {
          is_open = function() return open end,
          close = function() open = false end,
          queue_declare = function(_, name, opts)
            assert.is_true(opts.passive)
            asked[#asked + 1] = name
            if queues[name] then return { queue = name, message_count = queues[name] } end
            open = false
            return nil, errors.new { kind = "channel", code = 404, message = "no queue" }
          end,
        }
      end,
    }
  end

  local function app(fields)
    local spec = { name = "shop", queues = { q = {} }, consumers = { fields or {
      queue = "q", handler = print, retry = mr.retry.steps { 1, 5 },
    } } }
    made = mr.app(spec)
    made._consuming = connection()
    made._log = function(level, text) log[#log + 1] = level .. ": " .. text end
    local threshold = spec.consumers[1].in_process == true and math.huge or 0.1
    made.runners = { { queue = "q", canaries = {}, disposal = { ladder = ladder.new "shop", threshold = threshold } } }
    return made
  end

  local function watch(given, opts)
    opts = opts or {}
    opts.interval = 10
    off = m:watch_ladders(given, opts)
    runtime.advance(0)
  end

  local function page()
    local found = {}
    for line in m:text():gmatch "\nmoonrabbit_ladder_([^\n]+)" do found[#found + 1] = line end
    return found
  end

  before_each(function()
    runtime, m, queues, asked, away, log = virtual.new(), metrics.new(), {}, {}, false, {}
  end)

  it("are what passive declares count", function()
    queues = { ["shop.wait.1s"] = 3, ["shop.wait.5s"] = 0, ["shop.orphans"] = 2 }
    watch(app())
    assert.same({ 'known{ladder="shop"} 1', 'orphans{ladder="shop"} 2', 'waiting{ladder="shop",step="1s"} 3',
      'waiting{ladder="shop",step="5s"} 0' }, page())
  end)

  it("lose a step that is gone, and get it back once it is used again", function()
    queues = { ["shop.wait.1s"] = 3, ["shop.orphans"] = 0 }
    local a = app()
    a.runners[1].disposal.ladder._ready[1000] = "shop.wait.1s"
    watch(a)
    queues["shop.wait.1s"] = nil
    runtime.advance(10)
    assert.same({ 'known{ladder="shop"} 1', 'orphans{ladder="shop"} 0' }, page())
    assert.same({}, a.runners[1].disposal.ladder:used()) -- its next use declares it again
    queues["shop.wait.1s"] = 1
    a.runners[1].disposal.ladder._ready[1000] = "shop.wait.1s"
    runtime.advance(10)
    assert.equal('waiting{ladder="shop",step="1s"} 1', page()[3])
  end)

  it("ask but once for what was never there", function()
    queues = { ["shop.orphans"] = 0 }
    watch(app())
    assert.equal(3, #asked)
    runtime.advance(50)
    assert.equal(3 + 5, #asked)
  end)

  it("ask for steps that no policy names, when they were used", function()
    queues = { ["shop.wait.7s"] = 4, ["shop.orphans"] = 0 }
    local a = app()
    watch(a)
    a.runners[1].disposal.ladder._ready[7000] = "shop.wait.7s"
    runtime.advance(10)
    assert.equal('waiting{ladder="shop",step="7s"} 4', page()[3])
  end)

  it("ask on for what an earlier watch saw or used, as after a reload", function()
    queues = { ["shop.wait.7s"] = 4, ["shop.wait.9s"] = 5, ["shop.orphans"] = 0 }
    local old = app()
    watch(old)
    old.runners[1].disposal.ladder._ready[7000] = "shop.wait.7s"
    runtime.advance(10)
    old.runners[1].disposal.ladder._ready[9000] = "shop.wait.9s" -- nobody has looked since
    off()
    watch(app())
    assert.same({ 'known{ladder="shop"} 1', 'orphans{ladder="shop"} 0', 'waiting{ladder="shop",step="7s"} 4',
      'waiting{ladder="shop",step="9s"} 5' }, page())
    queues["shop.wait.7s"] = nil
    runtime.advance(10)
    assert.equal(3, #page())
    local before = #asked
    runtime.advance(10)
    assert.equal(2, #asked - before) -- of what is gone nobody asks any more
  end)

  it("leave the page while nobody can look, and come back", function()
    queues = { ["shop.wait.1s"] = 3, ["shop.orphans"] = 1 }
    watch(app())
    away = true
    runtime.advance(30)
    assert.same({ 'known{ladder="shop"} 0' }, page())
    assert.same({ "warn: the ladder 'shop' cannot be looked at: away" }, log)
    away = false
    runtime.advance(10)
    assert.equal(3, #page())
    away = true
    runtime.advance(10)
    assert.equal(2, #log)
  end)

  local function api(answer)
    return { queues = function(_, opts)
      asked[#asked + 1] = opts
      return answer(opts)
    end }
  end

  it("are what the management API tells, stuck messages too", function()
    watch(app(), { management = api(function()
      return {
        { name = "shop.wait.1s", messages = 5, messages_ready = 3, messages_dlx = 2 },
        { name = "shop.wait.9s", messages = 1, messages_ready = 1 },
        { name = "shop.orphans", messages = 7 }, { name = "shop.other", messages = 7 },
        { name = "myshop.wait.1s", messages_ready = 9 }, { name = "shop.wait.2s" }, { messages = 1 },
      }
    end) })
    assert.equal("v", asked[1].vhost)
    assert.same({ 'known{ladder="shop"} 1', 'orphans{ladder="shop"} 7', 'stuck{ladder="shop",step="1s"} 2',
      'stuck{ladder="shop",step="2s"} 0', 'stuck{ladder="shop",step="9s"} 0', 'waiting{ladder="shop",step="1s"} 3',
      'waiting{ladder="shop",step="9s"} 1' }, page())
  end)

  it("say so when the management API refuses, or its client throws", function()
    watch(app(), { management = api(function() return nil, errors.new { kind = "auth", message = "no rights" } end) })
    assert.same({ 'known{ladder="shop"} 0' }, page())
    assert.same({ "warn: the ladder 'shop' cannot be looked at: no rights" }, log)
    off()
    watch(app(), { management = api(function() error("needs LuaSocket", 0) end) })
    assert.same({ 'known{ladder="shop"} 0' }, page())
    assert.truthy(log[2]:find("needs LuaSocket", 1, true))
  end)

  it("end with off, also in the middle of a look", function()
    queues = { ["shop.orphans"] = 1 }
    watch(app())
    off()
    assert.same({}, page())
    off()
    local a = app()
    watch(a, { management = api(function()
      runtime.sleep(5)
      return { { name = "shop.orphans", messages = 7 } }
    end) })
    off()
    runtime.advance(20)
    assert.same({}, page())
    local before = #asked
    runtime.advance(60)
    assert.equal(before, #asked)
  end)

  it("are none where all retries are waited for in the process", function()
    watch(app { queue = "q", handler = print, in_process = true })
    assert.same({}, page())
    assert.same({}, asked)
  end)

  it("are not added up over processes", function()
    queues = { ["shop.wait.1s"] = 3, ["shop.orphans"] = 2 }
    watch(app())
    local text = metrics.sum { m:text(), m:text() }
    assert.truthy(text:find('moonrabbit_ladder_waiting{ladder="shop",step="1s"} 3\n', 1, true), text)
    assert.truthy(text:find('moonrabbit_ladder_orphans{ladder="shop"} 2\n', 1, true), text)
  end)

  it("take options that are some", function()
    for _, opts in ipairs { { interval = 0 }, { interval = "x" }, { management = "http://x" }, { every = 1 } } do
      assert.has_error(function() m:watch_ladders(app(), opts) end)
    end
  end)
end)

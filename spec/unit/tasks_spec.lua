-- A task that cannot be had (no memory, or outside of the loop) is started when it is needed again.
local Outbox = require "moonrabbit.publisher.outbox"
local Repairs = require "moonrabbit.connection.repairs"
local events = require "moonrabbit.connection.events"
local handling = require "moonrabbit.consumer.handling"
local virtual = require "support.virtual"

describe("a task that could not be started is started later:", function()
  local runtime

  before_each(function() runtime = virtual.new() end)

  local function without_tasks(fn, ...)
    local spawn = runtime.spawn
    function runtime.spawn() error("no task", 0) end
    local ok, err = pcall(fn, ...)
    runtime.spawn = spawn
    assert.same({ false, "no task" }, { ok, err })
  end

  it("that of listeners, which hear of everything", function()
    local heard = {}
    local connection = setmetatable({ _runtime = runtime, _listeners = {}, _events = {}, _first = 1, _last = 0,
      _event_bytes = 0 }, { __index = events })
    connection:on("blocked", function(why) heard[#heard + 1] = why end)
    without_tasks(connection._event, connection, "blocked", "first")
    connection:_event("blocked", "second")
    runtime.settle()
    assert.same({ "first", "second" }, heard)
  end)

  it("the worker of a consumer", function()
    local consumer = setmetatable({ _runtime = runtime, _idle = 0, _workers = 0, concurrency = 1, _waking = false },
      { __index = handling })
    without_tasks(consumer._wake_worker, consumer)
    assert.equal(0, consumer._workers)
    local spawned = 0
    function runtime.spawn() spawned = spawned + 1 end
    consumer:_wake_worker()
    assert.same({ 1, 1 }, { spawned, consumer._workers })
  end)

  it("that of repairs, which ends again", function()
    local told = 0
    local connection = { _runtime = runtime, _state = "closed", _policy = {} }
    function connection._log() told = told + 1 end
    local repairs = Repairs.new(connection)
    without_tasks(repairs.add, repairs, "channel", {})
    repairs:add("channel", {})
    runtime.settle()
    assert.is_nil(next(repairs.items))
    assert.is_false(repairs.running)
    assert.equal(0, told)
  end)

  it("those of an outbox: for what is confirmed, and for what has failed", function()
    local function log() end
    local outbox = assert(Outbox.open({ kind = "memory", interval = 5 }, "f", 1, runtime, log))
    local rows = {}
    for i = 1, 4 do rows[i] = outbox:add { body = tostring(i), number = i } end
    without_tasks(outbox.done, outbox, rows[1])
    outbox:done(rows[2])
    without_tasks(outbox.failed, outbox, rows[3])
    outbox:failed(rows[4])
    runtime.advance(1)
    assert.equal(2, outbox.count)
    assert.is_nil(outbox:next())
    runtime.advance(5)
    assert.same({ "3", "4" }, { outbox:next().body, outbox:next().body })
  end)
end)

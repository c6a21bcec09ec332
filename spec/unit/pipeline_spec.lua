-- Many calls in one go, against a broker that answers them one by one.
local fake = require "support.fake_broker"
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local pipeline = require "moonrabbit.connection.pipeline"
local scripted = require "support.scripted"

local WINDOW = 256

describe("a pipeline of calls", function()
  local broker, conn, waiting, most, writes, refused

  local function reply(frame)
    if broker.shut[frame.channel] then return end
    local name = frame.args:sub(4, 3 + frame.args:byte(3))
    if name ~= refused then
      return broker:say(fake.method(frame.channel, 50, 11, fake.short(name) .. fake.u32(0) .. fake.u32(0)))
    end
    broker.shut[frame.channel] = true
    broker:say(fake.method(frame.channel, 20, 40, fake.u16(406) .. fake.short "another one" .. fake.u16(50)
      .. fake.u16(10)))
  end

  -- One answer a turn, as a broker that has to work for each.
  local function answer()
    while waiting[1] do
      native.sleep(0)
      reply(table.remove(waiting, 1))
    end
  end

  local function connect(refuse)
    broker = scripted.start()
    broker.shut, refused = {}, refuse
    waiting, most, writes = {}, 0, 0
    local together = false
    broker.answers["50.10"] = function(frame)
      if not together then
        writes, together = writes + 1, true
        native.spawn(function() together = false end)
      end
      waiting[#waiting + 1] = frame
      most = math.max(most, #waiting)
      if #waiting == 1 then native.spawn(answer) end
      return ""
    end
    conn = assert(moonrabbit.connect { runtime = broker.runtime, heartbeat = 0 })
  end

  after_each(function() conn:close(1) end)

  local function run(count)
    local done, failed, steps = {}, {}, {}
    for i = 1, count do
      steps[i] = {
        method = "queue.declare", fields = { queue = "q" .. i },
        done = function(declared) done[#done + 1] = declared.queue end,
        failed = function(err) failed[#failed + 1] = i .. ": " .. err.code end,
      }
    end
    assert(pipeline.run(conn, conn._session, steps, 5))
    return done, failed
  end

  it("keeps within its window, answers in their order, and gathers what it sends", function()
    connect()
    local done = run(1000)
    assert.equal(1000, #done)
    for i, name in ipairs(done) do assert.equal("q" .. i, name) end
    assert.equal(WINDOW, most)
    assert.is_true(writes <= 1000 / (WINDOW / 2), writes .. " writes")
  end)

  it("goes on behind a call that is refused, on another channel", function()
    connect "q300"
    local done, failed = run(600)
    assert.same({ "300: 406" }, failed)
    assert.equal(599, #done)
    assert.equal("q299", done[299])
    assert.equal("q301", done[300])
    assert.equal("q600", done[599])
  end)

  it("has one out at a time where a call may end the connection", function()
    connect()
    conn._careful = true
    assert.equal(20, #(run(20)))
    assert.equal(1, most)
  end)
end)

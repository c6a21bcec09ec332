-- What a pool's connections know of one another, against a broker that follows a script.
local moonrabbit = require "moonrabbit"
local scripted = require "support.scripted"

describe("a pool of connections to two sites", function()
  local other, pool, ports, down

  before_each(function()
    other, ports, down = scripted.start(), {}, {}
    local open = other.runtime.open
    other.runtime.open = function(endpoint)
      ports[#ports + 1] = endpoint.port
      if down[endpoint.port] then return nil, "refused", "nobody listens", true end
      return open(endpoint)
    end
  end)
  after_each(function() pool:close(1) end)

  local function new(sites, connections)
    sites.primary, sites.standby = { uri = "amqp://127.0.0.1:5001" }, sites.standby or {}
    sites.standby.uri, sites.hold = "amqp://127.0.0.1:5002", math.huge
    pool = moonrabbit.pool { connections = connections, channels = 1,
      connect = { sites = sites, runtime = other.runtime, log = function() end } }
    return pool
  end

  local function lose(channel)
    pool:release(channel)
    moonrabbit.run(function()
      other:cut()
      while channel:is_open() do moonrabbit.sleep(0.001) end
    end)
  end

  it("leaves the primary only once that has been away for long enough", function()
    new { after = 60 }
    lose(assert(pool:acquire()))
    assert.equal(0, pool:stats().connections)
    down[5001] = true
    local none, err = pool:acquire(0.2)
    assert.is_nil(none)
    assert.equal("refused", err.kind)
    for _, port in ipairs(ports) do assert.equal(5001, port) end
    down[5001] = nil
    assert(pool:acquire())
  end)

  it("goes to the standby then, and stays released there", function()
    local asked = 0
    down[5001] = true
    new { after = 0, standby = { check = function()
      asked = asked + 1
      return asked == 1
    end } }
    local channel = assert(pool:acquire())
    moonrabbit.run(function()
      while not select(2, channel.connection:site()) do moonrabbit.sleep(0.001) end
    end)
    lose(channel)
    local site, released = assert(pool:acquire()).connection:site()
    assert.same({ "standby", true }, { site, released })
  end)

  it("goes back to the primary with the connection that moves, though another one at the standby is younger", function()
    down[5001] = true
    new({ after = 0 }, 2)
    local older = assert(pool:acquire())
    assert(pool:acquire())
    down[5001] = nil
    local connection = older.connection
    connection._source.wanted = "primary" -- as what looks at the primary does before it moves the connection
    other.answers["10.50"] = false
    connection:_move "the primary site is healthy again"
    other.answers["10.50"] = nil
    pool:release(older)
    assert.equal("primary", assert(pool:acquire()).connection:site())
  end)
end)

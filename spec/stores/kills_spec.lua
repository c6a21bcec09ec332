-- The short form of chaos/kills: workers killed -9 at random while messages fail, are retried and parked.
local broker = require "support.broker"
local postgres_server = require "support.postgres_server"
local process = require "support.process"

local unpack = rawget(table, "unpack") or rawget(_G, "unpack")

local function driver(name) return (pcall(require, "luasql." .. name)) end

local function play(...)
  return process.run({ "chaos/kills.lua", ... }, { env = { AMQP_URL = broker.url }, timeout = 280 })
end

describe("workers killed at random", function()
  local function case(why, what, ...)
    local words = { ... }
    broker.it_unless(it, pending, why)(what, function()
      local result = play(unpack(words))
      assert.equal(0, result.code, result.out .. result.err)
      assert.truthy(result.out:find("| **lost** | 0 |", 1, true), result.out)
      if words[#words] ~= "--without" then
        assert.truthy(result.out:find("| **done twice** | 0 |", 1, true), result.out)
      end
    end)
  end

  local no_sqlite = broker.none() or not driver "sqlite3" and "luasql.sqlite3 is not installed"
  local no_postgres = broker.none() or not driver "postgres" and "luasql.postgres is not installed"
    or postgres_server.missing()
  case(no_sqlite, "lose nothing, and do nothing twice in the transaction of their SQLite",
    "--messages", "2000", "--kills", "5")
  case(no_postgres, "nor two of them in PostgreSQL", "--messages", "500", "--kills", "4", "--workers", "2",
    "--database", "postgres")

  it("can be seen to do things twice without de-duplication by the same count", function()
    if no_sqlite then return pending(no_sqlite) end
    local result = play("--messages", "1500", "--kills", "5", "--without")
    assert.equal(0, result.code, result.out .. result.err)
  end)
end)
